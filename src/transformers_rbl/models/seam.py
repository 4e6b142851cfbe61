"""What transformers calls its arguments and outputs, by role: the only file that knows versions, and it fails closed.

Every argument of a stock `forward`, `get_image_features` and `get_video_features` has a role here. `check_stock`
refuses a class with an argument of unknown role, or without one that is needed; `Call` sorts a call's arguments by role
and hands them back under the installed names.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .pruning import PruningConfig


try:  # how stock records hidden states, by hooks that it installs once a module
    from transformers.utils.output_capturing import maybe_install_capturing_hooks as install_capture
except ImportError:
    install_capture = None

logger = logging.get_logger(__name__)

NEWEST_TESTED = "5.24"

# transformers 5.24 renamed `past_key_values`, as argument and as output; every name is understood on every version.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
CACHE: str = next(name for name in CACHE_NAMES if name in {item.name for item in fields(CausalLMOutputWithPast)})

MODALITIES = ("image", "video")
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
# What outputs and encoded features of pruned models say besides: which visual tokens stayed.
MASKS = {"image": "keep_masks", "video": "video_keep_masks"}
# In a family whose rows end with a mark in text: what the settings that features were pruned under say of row ends.
NEWLINES = "newlines"
# In a family that numbers tokens one after the other: whether these settings leave gaps where tokens were.
GAPS = "keep_positions"
# Parts of encoded features: the tokens, and further views of the same tokens, which lose what the tokens lose; what a
# stock forward reads besides; and what none reads.
TOKENS, VIEWS = "pooler_output", ("deepstack_features",)
ASIDE = ("visual_indicator_features",)
UNREAD = ("last_hidden_state", "hidden_states", "attentions")
# Outputs that Trainer would gather as predictions.
BESIDE_LOGITS = (
    *CACHE_NAMES,
    "image_hidden_states",
    "video_hidden_states",
    "image_outputs",
    "video_outputs",
    *MASKS.values(),
    "prompt_mask",
)


class Role(Enum):
    """What an argument is to pruning."""

    IDS = "token ids of the prompt"
    EMBEDS = "embeddings of the prompt"
    MASK = "attention mask, cached part included"
    POSITIONS = "positions of the prompt's tokens"
    CACHE = "KV cache"
    PIXELS = "pixels of images or videos"
    VISUAL = "describes the pixels"
    ENCODED = "visual features, encoded before"
    ALONG = "runs along the prompt"
    ROWS = "which logits to compute"
    SETTING = "does not run along the prompt"
    REFUSED = "describes the unpruned prompt, and cannot be followed"


# Arguments of `PruningConfig` and of our `from_pretrained`: no stock method has one of these names.
SETTINGS = (*(setting.name for setting in fields(PruningConfig)), "codebook")

# What runs along the prompt, and what stands at padding.
TYPES = "mm_token_type_ids"
# Stock's function for positions in images (m-RoPE), and its method that joins a user's processors with its own.
ROPE, MERGE = "get_rope_index", "_merge_criteria_processor_list"
ALONG: dict[str, float] = {"labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "per_layer_inputs": 0}

ROLES: dict[str, Role] = {
    "input_ids": Role.IDS,
    "inputs_embeds": Role.EMBEDS,
    "attention_mask": Role.MASK,
    "position_ids": Role.POSITIONS,
    "mm_encoder_outputs": Role.ENCODED,
    "logits_to_keep": Role.ROWS,
    **dict.fromkeys(CACHE_NAMES, Role.CACHE),
    **dict.fromkeys(PIXELS.values(), Role.PIXELS),
    **dict.fromkeys(ALONG, Role.ALONG),
    **dict.fromkeys(
        (
            "image_sizes",
            "image_sizes_videos",
            "batch_num_images",
            "vision_aspect_ratio",
            "vision_feature_layer",
            "vision_feature_layers",
            "vision_feature_select_strategy",
            "image_grid_thw",
            "video_grid_thw",
            "second_per_grid_ts",
            "image_position_ids",
            "video_position_ids",
            "num_frames_per_video",
            "pixel_attention_mask",
            "spatial_shapes",
            "image_token_pooling",
            "image_grids",
            "image_num_crops",
            "video_token_pooling",
            "video_grids",
        ),
        Role.VISUAL,
    ),
    **dict.fromkeys(
        (
            "use_cache",
            "return_dict",
            "output_attentions",
            "output_hidden_states",
            "output_router_logits",
            "num_items_in_batch",
        ),
        Role.SETTING,
    ),
    **dict.fromkeys(
        (
            "shift_labels",
            "cu_seq_lens_q",
            "cu_seq_lens_k",
            "max_length_q",
            "max_length_k",
            "seq_idx",
            "input_features",
            "input_features_mask",
            "cache_position",
        ),
        Role.REFUSED,
    ),
}  # fmt: skip  (a paragraph a role)
NEEDED = (Role.IDS, Role.EMBEDS, Role.MASK, Role.POSITIONS, Role.CACHE, Role.PIXELS, Role.ENCODED)


def installed() -> str:
    """`transformers 5.x.y`, for messages."""
    return f"transformers {transformers.__version__}"


def warn_if_untested() -> None:
    """One warning on a transformers newer than the newest that this library was tested with."""
    if Version(transformers.__version__).release[:2] > Version(NEWEST_TESTED).release[:2]:
        logger.warning_once(
            f"transformers_rbl was tested up to transformers {NEWEST_TESTED}, and this is {transformers.__version__}: "
            "`rbl verify` checks it on your model in a minute."
        )


def check_stock(stock: Any, mrope: bool = False) -> None:
    """Refuse a stock class that this library does not understand whole, when its pruned class is made.

    Args:
        stock (`type`): a headless or full stock class.
        mrope (`bool`): whether the family's positions say where a token lies in its image.

    Raises:
        TypeError: if `forward` lacks an argument that pruning needs, or if it or an encoder of images or videos has one
            of unknown role: whether it runs along the prompt is not known, and a wrong answer would not show. If
            positions are told by a function that is not there, or are where none was expected. If `generate` joins
            processors otherwise than it did.
    """
    encoders = [getattr(stock, f"get_{modality}_features", None) for modality in MODALITIES]
    rope = getattr(stock, ROPE, None)
    methods = [stock.forward, *encoders, rope]
    for method in filter(None, methods):
        names = _argument_names(method)
        if unknown := [name for name in names if name not in ROLES]:
            raise TypeError(
                f"{stock.__name__}.{method.__name__} of {installed()} takes {', '.join(unknown)}, and this version of "
                "transformers_rbl does not know whether that runs along the prompt: pruning this model is refused. "
                f"Upgrade transformers_rbl, or install transformers<={NEWEST_TESTED}.*."
            )
    reason = f"pruning this model is refused. Upgrade transformers_rbl, or install transformers<={NEWEST_TESTED}.*."
    is_full = hasattr(stock, "generate")
    if not is_full and mrope != (rope is not None):
        raise TypeError(
            f"{stock.__name__} of {installed()} has {'no' if mrope else 'a'} {ROPE}, which places its tokens: {reason}"
        )
    if mrope and TYPES not in _argument_names(stock.forward):
        raise TypeError(
            f"{stock.__name__}.forward of {installed()} takes no {TYPES}, which places its tokens: {reason}"
        )
    if is_full and not hasattr(stock, MERGE):
        raise TypeError(f"{stock.__name__} of {installed()} has no {MERGE}, which a user's processors need: {reason}")
    merger = getattr(stock, "inputs_merger", None)  # SmolVLM's, of releases that count tiles by their placeholders
    if merger is not None and "patch_size" in merger.__code__.co_varnames:
        raise TypeError(
            f"{stock.__name__} of {installed()} takes whole tiles of visual tokens alone: pruning this model needs a "
            "newer transformers."
        )
    roles = {ROLES[name] for name in _argument_names(stock.forward)}
    if missing := [role for role in NEEDED if role not in roles]:
        names = ", ".join(" or ".join(name for name, known in ROLES.items() if known is role) for role in missing)
        raise TypeError(
            f"{stock.__name__}.forward of {installed()} takes no {names} ({', '.join(r.value for r in missing)}), "
            f"which pruning needs: {reason}"
        )


def as_stock(method: Callable, stock: Callable) -> Callable:
    """A copy of one of our methods with the signature of the stock method that it stands for, plus `pruning`.

    transformers and Trainer read signatures to learn what a model takes. The code stays ours, for tracebacks and
    `inspect.getsource`; `stock`'s documentation is put before ours.
    """
    if not isinstance(method, types.FunctionType):
        raise TypeError(f"{method!r} is no plain function.")
    own = types.FunctionType(
        method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__
    )
    own.__kwdefaults__, own.__module__, own.__qualname__ = method.__kwdefaults__, method.__module__, method.__qualname__
    signature = inspect.signature(stock)
    parameters = list(signature.parameters.values())
    pruning = inspect.Parameter("pruning", inspect.Parameter.KEYWORD_ONLY, default=None)
    at = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    own.__signature__ = signature.replace(parameters=[*parameters[:at], pruning, *parameters[at:]])  # type: ignore[attr-defined]
    own.__doc__ = f"{inspect.getdoc(stock) or ''}\n\n{inspect.getdoc(method) or ''}"
    return own


def bound(stock: Callable, model: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of `stock(model, *args, **kwargs)` by name; a `TypeError` for surplus ones."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(stock)
    arguments = dict(signature.bind(model, *args, **kwargs).arguments)
    keywords = next((p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    arguments.update(arguments.pop(keywords, {}) if keywords else {})
    del arguments[next(iter(signature.parameters))]
    return arguments


def check_settings(arguments: dict[str, Any]) -> None:
    """Raise a `ValueError` for a setting of pruning outside `pruning=`, which stock would not read."""
    if misplaced := [name for name in SETTINGS if name in arguments]:
        if "codebook" in misplaced:
            raise ValueError("A codebook is not of one call: give it to from_pretrained, or call set_codebook.")
        given = ", ".join(f"{name}=…" for name in misplaced)
        raise ValueError(f"Settings of one call go into pruning=PruningConfig({given}).")


@dataclass
class Call:
    """The arguments of one call of `forward` or `generate`, by role.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, L)`, *optional*).
        inputs_embeds (`torch.Tensor` of shape `(batch, L, d)`, *optional*).
        attention_mask (`torch.Tensor` of shape `(batch, cached + L)`, *optional*).
        position_ids (`torch.LongTensor` of shape `(…, batch, L)`, *optional*).
        cache (`Cache`, *optional*).
        pixels (`dict[str, Any]`): by modality.
        visual (`dict[str, Any]`): what describes the pixels, by the stock name.
        features (`dict[str, ModelOutput]`): encoded before, by modality.
        along (`dict[str, torch.Tensor]`): what else runs along the prompt, `(batch, L, …)`.
        rows (`int` or `torch.Tensor`, *optional*): which logits are asked for.
        others (`dict[str, Any]`): everything else, settings of generation included.
    """

    input_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    cache: Any = None
    pixels: dict[str, Any] = field(default_factory=dict)
    visual: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    along: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: int | torch.Tensor | None = None
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, arguments: dict[str, Any]) -> Call:
        """Sort arguments by role. Those that are None count as not given, but for settings (`eos_token_id=None`).

        Raises:
            ValueError: for one thing under two names, and for a setting of pruning outside `pruning=`, which stock
                would not read.
        """
        check_settings(arguments)
        call = cls()
        single = {
            Role.IDS: "input_ids",
            Role.EMBEDS: "inputs_embeds",
            Role.MASK: "attention_mask",
            Role.POSITIONS: "position_ids",
            Role.CACHE: "cache",
            Role.ROWS: "rows",
        }
        modality = {name: kind for kind, name in PIXELS.items()}
        spelled: dict[str, str] = {}
        for name, value in arguments.items():
            role = ROLES.get(name, Role.SETTING)
            if role in (Role.SETTING, Role.REFUSED):
                call.others[name] = value
            elif value is None:
                continue
            elif role in single:
                if (place := single[role]) in spelled:
                    raise ValueError(f"The {role.value} was given twice, as {spelled[place]} and {name}: give one.")
                spelled[place] = name
                setattr(call, place, value)
            elif role is Role.PIXELS:
                call.pixels[modality[name]] = value
            elif role is Role.VISUAL:
                call.visual[name] = value
            elif role is Role.ENCODED:
                call.features = {kind: features for kind, features in value.items() if features is not None}
                for kind, features in call.features.items():
                    if kind not in MODALITIES or not isinstance(features, ModelOutput):
                        raise ValueError(
                            f"{name} holds {kind!r}, a {type(features).__name__}: it takes what get_image_features and "
                            "get_video_features return (return_dict=True), as 'image' and 'video'."
                        )
            else:
                call.along[name] = value
        return call

    def arguments(self) -> dict[str, Any]:
        """What stock is called with, under the installed names."""
        named = {
            "input_ids": self.input_ids,
            "inputs_embeds": self.inputs_embeds,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            CACHE: self.cache,
            "logits_to_keep": self.rows,
            "mm_encoder_outputs": self.features or None,
            **{PIXELS[modality]: pixels for modality, pixels in self.pixels.items()},
        }
        by_role = {name: value for name, value in named.items() if value is not None}
        return {**by_role, **self.visual, **self.along, **self.others}

    def copy(self) -> Call:
        """A call of its own: what is changed in it does not reach this one."""
        groups = {name: dict(getattr(self, name)) for name in ("pixels", "visual", "features", "along", "others")}
        return replace(self, **groups)

    @property
    def prompt(self) -> torch.Tensor:
        """`(batch, L)` or `(batch, L, d)`: embeddings where they are given, else ids.

        Raises:
            ValueError: if the call has neither.
        """
        prompt = self.inputs_embeds if self.inputs_embeds is not None else self.input_ids
        if prompt is None:
            raise ValueError("Pruning needs the prompt: pass input_ids (or inputs_embeds) beside the images.")
        return prompt

    def arguments_of_encoder(self, encode: Callable, modality: str) -> dict[str, Any]:
        """What `get_image_features` or `get_video_features` gets of this call."""
        names = _argument_names(encode)
        chosen = {name: value for name, value in self.visual.items() if name in names}
        return {PIXELS[modality]: self.pixels[modality], **chosen}

    def replace_visual(self, modality: str, selected: dict[str, Any]) -> None:
        """Give an encoder these arguments; without its pixels it does not run."""
        self.pixels = {kind: value for kind, value in self.pixels.items() if kind != modality}
        if selected:
            self.pixels[modality] = selected[PIXELS[modality]]
            self.visual = {**self.visual, **{n: value for n, value in selected.items() if n != PIXELS[modality]}}

    def drop_visual(self, encoders: list[Callable]) -> None:
        """Take pixels and what only their encoders read out of the call: features stand in their place."""
        spent = {name for encode in encoders for name in _argument_names(encode)}
        self.pixels = {}
        self.visual = {name: value for name, value in self.visual.items() if name not in spent}

    def refuse_what_cannot_follow(self) -> None:
        """Raise for arguments that describe the unpruned prompt and could not be shortened with it."""
        mask = self.attention_mask
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise ValueError(
                f"Pruning needs an attention_mask of shape (batch, original length); got a {type(mask).__name__}."
            )
        others = [name for name, value in self.others.items() if value is not None]
        if refused := [name for name in others if ROLES.get(name) is Role.REFUSED]:
            raise ValueError(f"{', '.join(refused)} describes the unpruned prompt and cannot be used with pruning.")
        lengths = {self.prompt.shape[1]}
        if isinstance(self.attention_mask, torch.Tensor):
            lengths.add(self.attention_mask.shape[-1])
        for name, value in self.others.items():
            if name in ROLES or name in _generation_options() or not isinstance(value, torch.Tensor):
                continue
            if lengths & set(value.shape):
                raise ValueError(
                    f"{name} is a tensor of the prompt's length, {tuple(value.shape)}, and pruning does not know how "
                    "to shorten it with the prompt: leave it out, or switch pruning off."
                )


def cache_of(outputs: Any) -> Any:
    """The KV cache of an output, None without one."""
    return outputs.get(CACHE)


def replaced(output: Any, **parts: Any) -> Any:
    """A copy of an output of transformers with some of its parts replaced."""
    output = copy.copy(output)
    for name, value in parts.items():
        output[name] = value
    return output


def without(output: Any, name: str) -> Any:
    """An output of transformers without one of its parts."""
    parts = {part: value for part, value in output.items() if part != name}
    names = {item.name for item in fields(output)}
    rest = type(output)(**{part: value for part, value in parts.items() if part in names})
    return replaced(rest, **{part: value for part, value in parts.items() if part not in names})


def read_by_stock(features: Any, counted: int | None = None) -> Any:
    """Encoded features with those parts alone that a stock forward reads, our masks left out.

    Args:
        features (`ModelOutput`): of `get_image_features` or `get_video_features`.
        counted (`int`, *optional*): length of the prompt that they were found to fit, see [`is_counted_for`].

    Raises:
        ValueError: for a part of which it is not known whether it goes with the tokens.
    """
    known = (TOKENS, *VIEWS, *ASIDE, *UNREAD, *MASKS.values(), NEWLINES, GAPS)
    if unknown := [name for name in features if name not in known]:
        raise ValueError(
            f"The visual features of {installed()} come with {', '.join(unknown)}, and this version of transformers_rbl"
            " does not know whether that goes with the tokens: upgrade it, or switch pruning off."
        )
    needed = {part.name: None for part in fields(features) if part.default is MISSING}  # timm's output has one
    parts = {name: features[name] for name in (TOKENS, *VIEWS, *ASIDE) if name in features}
    read = type(features)(**needed | parts)
    read.counted = counted if all(features.get(name) is None for name in (*VIEWS, *ASIDE)) else None
    return read


def misreads_gaps(model: Any) -> bool:
    """Whether attention takes positions with gaps for packed sequences behind a cache too, mask or not: transformers'
    FlashAttention, for a batch of one."""
    return "flash" in str(getattr(model.config.get_text_config(), "_attn_implementation", None))


def is_counted_for(length: int, features: Any) -> bool:
    """Whether these are visual tokens and nothing else, and as many as their prompt of this length has places: it is
    noted on the object, which `generate` hands from the encoder to `forward`, and lost on every copy. A prompt that has
    grown since may have got one more placeholder."""
    return getattr(features, "counted", None) == length


def in_a_row(tokens: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Visual tokens `(n, d)` of all entries; a video of LLaVA-NeXT-Video has an axis more than others."""
    entries = [tokens] if isinstance(tokens, torch.Tensor) else tokens
    return torch.cat([entry.flatten(0, -2) for entry in entries])


def with_features(outputs: Any, features: dict[str, Any]) -> Any:
    """An output of `forward` with the visual features that stock hands on in it."""
    names = {item.name for item in fields(outputs)}
    for modality, output in features.items():
        if f"{modality}_outputs" in names:
            outputs[f"{modality}_outputs"] = output
        elif f"{modality}_hidden_states" in names:  # until transformers 5.24
            tokens = output[TOKENS]
            outputs[f"{modality}_hidden_states"] = tokens if isinstance(tokens, torch.Tensor) else in_a_row(tokens)
    return outputs


def stock_positions(model: Any, call: Call, past: Any, seen: int) -> torch.Tensor | None:
    """Positions that stock gives the unpruned prompt, where they say where a token lies in its image (m-RoPE).

    By stock's own function, which unlike its `forward` and `generate` writes nothing on the module.

    Args:
        model: full or headless.
        call ([`Call`]): the prompt, whole or what is new of it, with the grids of its images.
        past ([`Past`]): what it continues.
        seen (`int`): leading columns of the prompt that the cache stands for.

    Returns:
        `torch.LongTensor` of shape `(3, batch, n)`, the last columns those of the new prompt; None for text alone, and
        for models that number tokens one after the other.

    Raises:
        ValueError: for images without what their positions are told by, which stock would place like text.
    """
    rope = getattr(model.base_model, ROPE, None)
    if rope is None:
        return None
    names = _argument_names(rope)
    described = {name: on_host(value) for name, value in call.visual.items() if name in names}
    grids = {kind: described[f"{kind}_grid_thw"] for kind in MODALITIES if f"{kind}_grid_thw" in described}
    if not grids:
        if call.features:
            raise ValueError("Give image_grid_thw (video_grid_thw) beside mm_encoder_outputs: positions depend on it.")
        return None
    types = call.along.get(TYPES)
    if types is None or call.input_ids is None:
        missing = TYPES if types is None else "input_ids"
        raise ValueError(
            f"{missing} is missing: without it, image tokens would be placed like text. Pass all that the "
            "processor returns."
        )
    length = call.input_ids.shape[1]
    if types.shape[1] < length:
        raise ValueError(f"{TYPES} of shape {tuple(types.shape)} does not cover a prompt of {length} tokens.")
    # On the host: stock's function, like ours, asks for values all along.
    mask = None if call.attention_mask is None else on_host(call.attention_mask[:, -length:])
    ids, types = on_host(call.input_ids), on_host(types[:, -length:])
    shown = types if mask is None else types * mask
    merge = model.base_model.config.vision_config.spatial_merge_size
    is_whole = past.length == 0 or (seen > 0 and _missing(shown, grids, merge) is None)
    first = 0 if is_whole else seen
    if (missing := _missing(shown[:, first:], grids, merge)) is not None:
        raise ValueError(
            f"{missing}: use the checkpoint's own processor, hide no part of an image by the attention mask, "
            "and behind a cache give the pixels of all images or of the new ones."
        )
    if not is_whole and past.memory is None:
        raise ValueError("This cache was filled without pruning: pass the whole prompt with all its images again.")
    own_mask = None if mask is None else mask[:, first:]
    along = {TYPES: types[:, first:], "attention_mask": own_mask}
    try:
        positions = rope(ids[:, first:], **described, **along)[0].to(call.input_ids.device)
    except (RuntimeError, StopIteration) as error:  # as many tokens in all, but not in each prompt
        raise ValueError(
            "The images' grids do not fit the prompts in their order: give images as prompts name them."
        ) from error
    return positions if is_whole else positions + past.memory.position_at(past.length, call.attention_mask)[:, None]


def on_host(value: Any) -> Any:
    """A tensor where its values can be read without a wait; anything else as it is."""
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _missing(shown: torch.Tensor, grids: dict[str, torch.Tensor], merge: int) -> str | None:
    """What does not fit between the attended token types `(batch, n)` and the grids given; None if all does."""
    for kind, modality in enumerate(MODALITIES, start=1):
        placeholders = int((shown == kind).sum())
        tokens = int(grids[modality].prod(-1).sum()) // merge**2 if modality in grids else 0
        if placeholders != tokens:
            return f"The prompt has {placeholders} {modality} placeholders, its {modality}s {tokens} visual tokens"
    return None


def can_chunk_images() -> bool:
    """Whether the installed `generate` splits visual features over the chunks of a chunked prefill (5.19 gives every
    chunk all of them, and a wrong answer without a word)."""
    from transformers.generation import utils as generation_utils

    return hasattr(generation_utils, "_slice_mm_encoder_output")


def _argument_names(method: Callable) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = list(inspect.signature(method).parameters.values())
    return [p.name for p in parameters if p.name not in ("self", "pruning") and p.kind not in kinds]


@functools.cache
def _generation_options() -> frozenset[str]:
    """Arguments of `generate`'s own: a tensor among them is a prompt or a length of its own."""
    from transformers import GenerationMixin  # late: families are listed before transformers is imported whole

    return frozenset(inspect.signature(vars(GenerationMixin)["generate"]).parameters)
