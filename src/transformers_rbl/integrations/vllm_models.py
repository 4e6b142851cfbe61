"""What all our models in vLLM share: its own models, with visual tokens dropped between projector and language model.

Front end: the processor says how many placeholders an image gets, from its size and the keep ratio alone, and sends
along what each token is. Model: the same rule as in transformers picks the tokens, and their number is checked against
the placeholders', since vLLM would take the first of too many features without a word. Families: vllm_llava.py,
vllm_qwen.py, vllm_internvl.py.
"""

# The engine has an environment of its own (tests/engines): where types are checked, it cannot be found.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails

from ..models.codebook import RedundancyCodebook
from ..models.layout import VisualLayout
from ..models.pruning import PruningConfig
from ..models.seam import MODALITIES
from .serving import ImageLayouts, kept_of_image, served_pruning, with_keep_ratio


# What travels with an image or video from the processor to the model: what its tokens are, how many frames it has,
# which share stays, how many that is.
KINDS, FRAMES, RATIO, KEPT = TOLD = ("token_kinds", "token_frames", "keep_ratio", "kept_tokens")


Mixed: Any = object  # vLLM's own classes, which these are mixed into


# --- front end: how many placeholders ---------------------------------------------------------------------------------


class RBLInfo(Mixed):
    """Counts of visual tokens."""

    @cached_property
    def pruning(self) -> PruningConfig:
        return served_pruning(self.get_hf_config())

    @cached_property
    def layouts(self) -> ImageLayouts:
        return ImageLayouts(self.get_hf_config())


class RBLProcessor(Mixed):
    """Adds to each image or video what its tokens are and which share of them stays."""

    def layouts_of(self, mm_items: Any, data: Any) -> Mapping[str, list[VisualLayout]]:
        """By modality, of what the stock processor made `data` of: what is to be encoded."""
        raise NotImplementedError

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        pruning = with_keep_ratio(self.info.pruning, hf_kwargs.get(RATIO))
        data = super()._apply_hf_processor_main(mm_items, without_ratio(hf_kwargs))
        for modality, layouts in self.layouts_of(mm_items, data).items():
            if modality == "video" and pruning.enabled and not pruning.per_frame:
                raise ValueError(
                    "per_frame=False keeps a number of tokens of each video frame that depends on the video, and an "
                    "engine must know it before it has encoded one: leave it at True."
                )
            told = {
                KINDS: [layout.kinds.to(torch.uint8) for layout in layouts],
                FRAMES: torch.tensor([layout.frames for layout in layouts]),
                RATIO: torch.full((len(layouts),), pruning.keep_ratio or 1.0, dtype=torch.float64),
                KEPT: torch.tensor([layout.kept_count(pruning) for layout in layouts]),
            }
            data |= {f"{modality}_{name}": value for name, value in told.items()}
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, without_ratio(hf_processor_mm_kwargs)))
        for modality in MODALITIES:
            for name in TOLD:
                fields[f"{modality}_{name}"] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        """What stock puts for an image or video, with fewer placeholders."""
        updates = super()._get_prompt_updates(mm_items, without_ratio(hf_processor_mm_kwargs), out_mm_kwargs)

        def fewer(update: Any) -> Any:
            name, items = f"{update.modality}_{KEPT}", out_mm_kwargs.get(update.modality, [])

            def replacement(index: int) -> Any:
                content = update.replacement(index)
                return thinned(content, int(items[index][name].data)) if name in items[index] else content

            return replace(update, replacement=replacement)

        return [fewer(update) for update in updates]


def without_ratio(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A request's settings for the stock processor, which knows of no keep ratio."""
    return {name: value for name, value in kwargs.items() if name != RATIO}


def thinned(content: Any, kept: int) -> PromptUpdateDetails:
    """An image's or video's part of the prompt with `kept` placeholders in all, the same number in each run of them:
    text and marks between a video's frames stay."""
    details = content if isinstance(content, PromptUpdateDetails) else PromptUpdateDetails.from_seq(content)
    visual = [True] * len(details.full) if details.is_embed is None else details.is_embed(details.full).tolist()
    runs = [(is_run, [token for _, token in run]) for is_run, run in groupby(zip(visual, details.full), lambda p: p[0])]
    count = sum(is_run for is_run, _ in runs)
    if kept % count or any(len(run) < kept // count for is_run, run in runs if is_run):
        raise ValueError(f"{kept} visual tokens do not go into {count} runs of placeholders.")
    return replace(details, full=[token for is_run, run in runs for token in (run[: kept // count] if is_run else run)])


# --- model: which tokens ----------------------------------------------------------------------------------------------


class RBLModel(Mixed):
    """Encodes images as the stock model does, then drops redundant tokens."""

    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        pruning = served_pruning(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pruning, self.codebook, self.width = pruning, None, config.get_text_config().hidden_size
        if config.num_prototypes is not None:
            self.codebook = RedundancyCodebook.uninitialised(config.num_prototypes, self.width, config.codebook)
        # vLLM packs as many images into a step as their pruned tokens allow. Here they go through tower and projector
        # in groups that stock would have formed, so that memory stays what stock needs.
        self.tokens_at_once = vllm_config.scheduler_config.max_num_encoder_input_tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        features = []
        for modality in MODALITIES:
            if f"{modality}_{KINDS}" in kwargs:
                told = [list(kwargs.pop(f"{modality}_{name}")) for name in TOLD]
                visual = {name: kwargs.pop(name) for name in list(kwargs) if self.belongs(name, modality)}
                for part in groups([len(kinds) for kinds in told[0]], self.tokens_at_once):
                    chosen = self.part_of(visual, modality, part)
                    encoded = super().embed_multimodal(**chosen)
                    kept = zip(encoded, *(values[part] for values in told), strict=True)
                    features += self.placed([self._keep(*one) for one in kept], modality, chosen)
        return features or self.chosen_outside(kwargs)

    def belongs(self, name: str, modality: str) -> bool:
        """Whether an argument is of this modality."""
        return ("video" in name) == (modality == "video")

    def part_of(self, visual: Mapping[str, Any], modality: str, part: slice) -> dict[str, Any]:
        """The arguments for some of the images or videos."""
        return {name: value[part] for name, value in visual.items()}

    def placed(self, kept: list[tuple[torch.Tensor, torch.Tensor]], modality: str, visual: Any) -> list[torch.Tensor]:
        """What vLLM gets of the kept tokens and their masks."""
        return [tokens for tokens, _ in kept]

    def chosen_outside(self, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Embeddings that the caller chose, of any length; stock would want all of one length, and end the engine if
        not."""
        embeds = kwargs.get("image_embeds")
        return [] if embeds is None else list(embeds)

    def _keep(
        self, tokens: torch.Tensor, kinds: torch.Tensor, frames: int, ratio: float, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of one image or video that stay, and the mask that chose them."""
        pruning = with_keep_ratio(self.pruning, float(ratio)) if self.pruning.enabled else self.pruning
        layout = VisualLayout(kinds.long(), int(frames))
        kept, mask = kept_of_image(tokens, layout, pruning, self.codebook, self.width)
        if len(kept) != int(count):
            raise ValueError(
                f"{len(kept)} visual tokens were kept for {int(count)} placeholders: the settings of processor and "
                "model differ."
            )
        return kept, mask

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        found = []

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.endswith("codebook.prototypes"):
                    found.append(tensor)
                else:
                    yield name, tensor

        loaded = super().load_weights(others())
        if self.codebook is None:
            return loaded
        wanted = tuple(self.codebook.prototypes.shape)
        if not found:
            raise ValueError("The checkpoint's config announces a codebook, but its weights hold no prototypes.")
        if tuple(found[0].shape) != wanted:
            raise ValueError(f"The checkpoint's prototypes are {tuple(found[0].shape)}; its config announces {wanted}.")
        self.codebook.prototypes.copy_(found[0])
        self.codebook.normalise()
        if not self.codebook.is_loaded:
            raise ValueError("The checkpoint's prototypes hold NaN or infinite values.")
        return loaded | {"codebook.prototypes"}

    def get_mm_lora_token_counts(self, *, modality: str, mm_kwargs: Any, num_mm_embeds: int) -> Any:
        raise NotImplementedError("LoRA on the vision tower or the projector is not served with pruning.")


def groups(lengths: list[int], limit: int) -> Iterator[slice]:
    """Consecutive images whose tokens add up to `limit` at most, one image at least."""
    start = total = 0
    for index, length in enumerate(lengths):
        if index > start and total + length > limit:
            yield slice(start, index)
            start, total = index, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))


def flat_part(pixels: torch.Tensor, lengths: torch.Tensor, part: slice) -> torch.Tensor:
    """The rows of some images, where pixels of all images stand one after the other."""
    return torch.cat(pixels.split(lengths.tolist())[part])
