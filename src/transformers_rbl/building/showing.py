"""One image as the language model is asked about it: the prompt, the visual tokens, and where each lies.

The LLaVA families show their base image, encoded by the code of LLaVA-1.5. Every other family shows what its own
processor makes of one image in one piece: placeholders, marks and positions are those that stock gives the prompt.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaModel

from ..inputs import image_arguments, image_runs, layout_of, split_inputs
from ..models.families import FAMILIES
from ..models.family import Family
from ..models.llava_family import LlavaFamily, cls_cosines
from ..models.seam import PIXELS, TOKENS, VIEWS, Call, read_by_stock, replaced
from ..prompts import chat_prompt, placeholder, prompt_text
from .recipe import Recipe


# Settings by which image processors cut an image into tiles, or add crops of it.
TILING = ("crop_to_patches", "do_image_splitting", "do_pan_and_scan")


@dataclass
class Shown:
    """An image, and a prompt about it.

    Args:
        ids (`torch.LongTensor` of shape `(L,)`): the prompt, with a placeholder for every visual token.
        slots (`torch.BoolTensor` of shape `(L,)`): where the placeholders are.
        tokens (`torch.Tensor` of shape `(n, d)`): the visual tokens.
        grid (`tuple[int, int]`): rows and columns in which they lie over the image.
        encoded (`ModelOutput`): what stock reads beside the tokens.
        views (`dict[str, list[torch.Tensor]]`): further views of the tokens, each `(n, d)`, by name (deepstack).
        positions (`torch.LongTensor` of shape `(3, L)`, *optional*): `(t, h, w)` of the whole prompt (m-RoPE).
        types (`dict[str, torch.LongTensor]`): what else runs along the prompt, each `(L,)`.
        cls_similarity (`torch.Tensor` of shape `(n,)`, *optional*): cosines with the vision tower's [cls].
    """

    ids: torch.Tensor
    slots: torch.Tensor
    tokens: torch.Tensor
    grid: tuple[int, int]
    encoded: Any
    views: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    positions: torch.Tensor | None = None
    types: dict[str, torch.Tensor] = field(default_factory=dict)
    cls_similarity: torch.Tensor | None = None


def family_of(model: PreTrainedModel) -> Family | None:
    """What is known of a model's family, stock or pruned."""
    return FAMILIES.get(model.config.model_type.removesuffix("_rbl"))


def why_not(model: PreTrainedModel, recipe: Recipe | None = None) -> str | None:
    """Why a model cannot be probed, in one sentence; None if it can.

    Args:
        model (`PreTrainedModel`): a full model.
        recipe ([`Recipe`], *optional*): whose targets it has to have.
    """
    family, name = family_of(model), model.config.model_type
    if family is None:
        return f"Codebooks are built for {', '.join(FAMILIES)}, and this is a {name} model."
    if model.get_output_embeddings() is None or not hasattr(model.base_model, "get_image_features"):
        return f"{type(model).__name__} does not answer questions about images: load the full {name} model."
    if recipe is not None and recipe.targets["by"] == "cls_rank" and not family.has_cls(model.base_model):
        return (
            "The recipe ranks targets by similarity to the vision tower's [cls] token, and this tower has none: give "
            'targets by "positions", "stride" or "all".'
        )
    return None


def is_supported(model: PreTrainedModel) -> bool:
    """Whether a model can be probed, see [`why_not`]."""
    return why_not(model) is None


def show(model: PreTrainedModel, processor: ProcessorMixin, prompt: str, image: Image.Image) -> Shown:
    """An image and a question about it, as the model is asked.

    Args:
        model (`PreTrainedModel`): a full model of a family in [`FAMILIES`]; it never prunes here.
        processor (`ProcessorMixin`): the checkpoint's.
        prompt (`str`): the question, which follows the image.
        image (`PIL.Image.Image`): RGB.

    Raises:
        ValueError: if it is not known how the image's tokens lie in it, or the prompt has not one image.
    """
    if isinstance(family_of(model), LlavaFamily):
        prefix, suffix = split_prompt(processor, prompt)
        return show_base(model, prefix, suffix, base_pixels(processor, image))
    return show_whole(model, processor, prompt, image)


def show_base(model: PreTrainedModel, prefix: list[int], suffix: list[int], pixel_values: torch.Tensor) -> Shown:
    """A base image of the LLaVA families: no tiles, no row ends.

    Args:
        model (`PreTrainedModel`): LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision.
        prefix, suffix (`list[int]`): the prompt before and after the visual tokens, see [`split_prompt`].
        pixel_values (`torch.Tensor` of shape `(channels, height, width)`): see [`base_pixels`].

    Raises:
        ValueError: if the image's tokens are no square grid.
    """
    config, headless = model.config, model.base_model
    weight = next(headless.get_submodule("vision_tower").parameters())
    pixels = pixel_values[None].to(weight.device, weight.dtype)
    # By the code of LLaVA-1.5, which has no tiles and no row ends. Its decorator takes return_dict.
    outputs = LlavaModel.get_image_features(cast(LlavaModel, headless), pixels, return_dict=True)  # pyright: ignore[reportCallIssue]
    device = next(model.get_input_embeddings().parameters()).device
    tokens = outputs.pooler_output[0].to(device)
    side = config.vision_config.image_size // config.vision_config.patch_size
    cosines = cls_cosines(outputs.hidden_states, config.vision_feature_layer)[0, :, 0]
    has_cls = len(cosines) == side**2 + 1
    side = round(len(tokens) ** 0.5)
    if side * side != len(tokens):
        raise ValueError(f"An image has {len(tokens)} tokens, which is no square grid: its neighbours are unknown.")
    ids = torch.tensor([*prefix, *[config.image_token_id] * len(tokens), *suffix], device=device)
    slots = torch.zeros(len(ids), dtype=torch.bool, device=device)
    slots[len(prefix) : len(prefix) + len(tokens)] = True
    similarity = cosines[-len(tokens) :] if has_cls else None
    return Shown(ids, slots, tokens, (side, side), BaseModelOutputWithPooling(), cls_similarity=similarity)


def show_whole(model: PreTrainedModel, processor: ProcessorMixin, prompt: str, image: Image.Image) -> Shown:
    """An image in one piece, as any family's own processor and encoder see it.

    Raises:
        ValueError: if it is not known how the image's tokens lie in it.
    """
    family, headless = family_of(model), model.base_model
    assert family is not None  # why_not asks first
    whole = {name: False for name in TILING if hasattr(processor.image_processor, name)}
    settings: Any = {"images": [[image]], "return_tensors": "pt", "images_kwargs": whole}
    inputs: Any = processor(text=[prompt_text(processor, prompt, 1)], **settings)
    inputs = inputs.to(model.device, model.dtype)
    along, visual = split_inputs(inputs)
    ids = along["input_ids"][0]
    arguments = image_arguments(model, inputs)
    stock: Any = getattr(type(headless), "stock", type(headless))
    encoded = stock.get_image_features(headless, **arguments, return_dict=True)
    entries = family.split(model.config, list(encoded[TOKENS]))
    device = next(model.get_input_embeddings().parameters()).device
    tokens = torch.cat(entries).to(device)
    slots = ids == model.config.image_token_id
    if int(slots.sum()) != len(tokens):
        raise ValueError(f"The processor makes {int(slots.sum())} placeholders of an image of {len(tokens)} tokens.")
    layout = layout_of(
        family.layouts(headless, "image", arguments), list(map(len, entries)), image_runs(model, ids[None])
    )
    if layout is None or layout.has_tiles:
        raise ValueError(
            f"How the {len(tokens)} tokens of a {family.model_type} image lie in it is not known here: its neighbours "
            "are unknown."
        )
    rows, columns = layout.grids["base"].shape
    views = {name: [torch.cat(list(view)).to(device) for view in encoded[name]] for name in VIEWS if encoded.get(name)}
    rope = getattr(headless, "get_rope_index", None)
    positions = None
    if rope is not None:
        asked = inspect.signature(rope).parameters
        positions = rope(**{name: value for name, value in {**along, **visual}.items() if name in asked})[0][:, 0]
    types = {name: values[0] for name, values in Call.read(along).along.items()}
    return Shown(ids, slots, tokens, (rows, columns), read_by_stock(encoded), views, positions, types)


def features_of(family: Family, shown: Shown, tokens: torch.Tensor, views: dict[str, list[torch.Tensor]]) -> Any:
    """Encoded features as stock `forward` reads them.

    Args:
        family ([`Family`]): the model's.
        shown ([`Shown`]): whose tokens these are.
        tokens (`torch.Tensor` of shape `(m, d)`): those of all rows, one after the other.
        views (`dict[str, list[torch.Tensor]]`): of the same tokens.
    """
    parts = {name: [[rows] for rows in layers] for name, layers in views.items()}
    return replaced(shown.encoded, **{TOKENS: family.joined("image", [tokens])}, **parts)


def split_prompt(processor: ProcessorMixin, prompt: str) -> tuple[list[int], list[int]]:
    """Token ids before and after the image, of a prompt in the checkpoint's own chat template.

    Args:
        processor (`ProcessorMixin`): the checkpoint's.
        prompt (`str`): the question about the image, which comes first.

    Raises:
        ValueError: if the prompt does not have one image token.
    """
    tokenizer = tokenizer_of(processor)
    ids = list(tokenizer(chat_prompt(processor, [{"type": "image"}, {"type": "text", "text": prompt}]))["input_ids"])
    image_id = tokenizer.convert_tokens_to_ids(placeholder(processor, "image"))
    if ids.count(image_id) != 1:
        raise ValueError(f"The chat template puts {ids.count(image_id)} image tokens into a prompt about one image.")
    place = ids.index(image_id)
    return ids[:place], ids[place + 1 :]


def base_pixels(processor: ProcessorMixin, image: Image.Image) -> torch.Tensor:
    """The base image's pixels `(channels, height, width)`, as the checkpoint's processor makes them."""
    pixels = processor.image_processor(image, return_tensors="pt")[PIXELS["image"]][0]
    return pixels[0] if pixels.ndim == 4 else pixels


def tokenizer_of(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """A processor's tokenizer, an attribute that its class does not declare."""
    return processor.tokenizer
