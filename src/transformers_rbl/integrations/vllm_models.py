"""Our three families in vLLM 0.32: its own models, with visual tokens dropped between projector and language model.

Front end: the processor says how many placeholders an image gets, from its size and the keep ratio alone, and sends
along what each token is. Model: the same rule as in transformers picks the tokens, and their number is checked against
the placeholders', since vLLM would take the first of too many features without a word.
"""

# The engine has an environment of its own (tests/engines): where types are checked, it cannot be found.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement

from ..models.codebook import RedundancyCodebook
from ..models.layout import VisualLayout
from ..models.pruning import PruningConfig
from .serving import ImageLayouts, keep_of_image, served_pruning, with_keep_ratio


# What travels with an image from the processor to the model: what its tokens are, which share stays, how many that is.
KINDS, RATIO, KEPT = "token_kinds", "keep_ratio", "kept_tokens"


# --- front end: how many placeholders ---------------------------------------------------------------------------------


Mixed: Any = object  # vLLM's own classes, which these are mixed into below


class RBLInfo(Mixed):
    """Counts of visual tokens. `stock` is the class that this one is mixed into."""

    stock: Any

    @cached_property
    def pruning(self) -> PruningConfig:
        return served_pruning(self.get_hf_config())

    @cached_property
    def layouts(self) -> ImageLayouts:
        return ImageLayouts(self.get_hf_config())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def layout(self, width: int, height: int) -> VisualLayout:
        """Of what is encoded of an image."""
        layout = self.layouts(height, width)
        unpruned = super().get_num_image_tokens(image_width=width, image_height=height)
        if len(layout) != unpruned:
            raise ValueError(
                f"An image of {width}x{height} pixels has {len(layout)} visual tokens in transformers and {unpruned} "
                "in vLLM: pruning cannot serve it."
            )
        return layout.encoded(self.pruning)

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        return self.layout(image_width, image_height).kept_count(self.pruning)

    def get_image_size_with_most_features(self) -> Any:
        # The image that memory is reserved for is the one of most unpruned tokens; pruned counts tie.
        return self.stock(self.ctx).get_image_size_with_most_features()


class RBLProcessor(Mixed):
    """Adds to each image what its tokens are and which share of them stays."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        hf_kwargs = dict(hf_kwargs)
        pruning = with_keep_ratio(self.info.pruning, hf_kwargs.pop("keep_ratio", None))
        data = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if "pixel_values" in data:
            images = mm_items.get_items("image", ImageProcessorItems)
            sizes = [images.get_image_size(index) for index in range(len(images))]
            layouts = [self.info.layout(size.width, size.height) for size in sizes]
            data[KINDS] = [layout.kinds.to(torch.uint8) for layout in layouts]
            data[KEPT] = torch.tensor([layout.kept_count(pruning) for layout in layouts])
            ratio = 1.0 if pruning.keep_ratio is None else pruning.keep_ratio
            data[RATIO] = torch.full((len(sizes),), ratio, dtype=torch.float64)
            if pruning.enabled and pruning.tiles == "base" and data["pixel_values"][0].ndim == 4:
                data["pixel_values"] = [tiles[:1] for tiles in data["pixel_values"]]
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        for name in (KINDS, RATIO, KEPT):
            fields[name] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        token = self.info.get_hf_config().image_token_index
        items = out_mm_kwargs.get("image", [])

        def placeholders(index: int) -> list[int]:
            item = items[index]
            return [token] * int(item[KEPT].data if KEPT in item else len(item["image_embeds"].data))

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]


# --- model: which tokens ----------------------------------------------------------------------------------------------


class RBLModel(Mixed):
    """Encodes images as the stock model does, then drops redundant tokens."""

    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        pruning = served_pruning(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pruning, self.codebook = pruning, None
        if config.num_prototypes is not None:
            width = config.text_config.hidden_size
            self.codebook = RedundancyCodebook.uninitialised(config.num_prototypes, width, config.codebook)
        # vLLM packs as many images into a step as their pruned tokens allow. Here they go through tower and projector
        # in groups that stock would have formed, so that memory stays what stock needs.
        self.tokens_at_once = vllm_config.scheduler_config.max_num_encoder_input_tokens

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if kwargs.get("pixel_values") is None:
            # Chosen by the caller, of any length; stock would want all of one length, and end the engine if not.
            embeds = kwargs.get("image_embeds")
            return [] if embeds is None else list(embeds)
        kinds, ratios, counts = (list(kwargs.pop(name)) for name in (KINDS, RATIO, KEPT))
        features = []
        for part in groups([len(kind) for kind in kinds], self.tokens_at_once):
            images = super().embed_multimodal(**{name: value[part] for name, value in kwargs.items()})
            features += map(self._keep, images, kinds[part], ratios[part], counts[part])
        return features

    def _keep(self, tokens: torch.Tensor, kinds: torch.Tensor, ratio: float, count: int) -> torch.Tensor:
        pruning = with_keep_ratio(self.pruning, float(ratio)) if self.pruning.enabled else self.pruning
        kept = tokens[keep_of_image(tokens, VisualLayout(kinds.long()), pruning, self.codebook)]
        if len(kept) != int(count):
            raise ValueError(
                f"{len(kept)} visual tokens were kept for {int(count)} placeholders: the settings of processor and "
                "model differ."
            )
        return kept

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


def either_layout(stock: WeightsMapper) -> WeightsMapper:
    """Weights as transformers 5 writes them, whose vision towers have no `vision_model.` level, and as before."""
    prefixes = dict(stock.orig_to_new_prefix)
    for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head."):
        prefixes[f"vision_tower.{part}"] = f"vision_tower.vision_model.{part}"
        prefixes[f"model.vision_tower.{part}"] = f"vision_tower.vision_model.{part}"
    return WeightsMapper(orig_to_new_prefix=prefixes)


# --- families ---------------------------------------------------------------------------------------------------------


class LlavaRBLInfo(RBLInfo, LlavaProcessingInfo):
    stock = LlavaProcessingInfo


class LlavaNextRBLInfo(RBLInfo, LlavaNextProcessingInfo):
    stock = LlavaNextProcessingInfo


class LlavaOnevisionRBLInfo(RBLInfo, LlavaOnevisionProcessingInfo):
    stock = LlavaOnevisionProcessingInfo


class LlavaRBLProcessor(RBLProcessor, LlavaMultiModalProcessor):
    pass


class LlavaNextRBLProcessor(RBLProcessor, LlavaNextMultiModalProcessor):
    pass


class LlavaOnevisionRBLProcessor(RBLProcessor, LlavaOnevisionMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(LlavaRBLProcessor, info=LlavaRBLInfo, dummy_inputs=LlavaDummyInputsBuilder)
class LlavaForConditionalGenerationRBL(RBLModel, LlavaForConditionalGeneration):
    hf_to_vllm_mapper = either_layout(LlavaForConditionalGeneration.hf_to_vllm_mapper)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextRBLProcessor, info=LlavaNextRBLInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaNextForConditionalGenerationRBL(RBLModel, LlavaNextForConditionalGeneration):
    hf_to_vllm_mapper = either_layout(LlavaNextForConditionalGeneration.hf_to_vllm_mapper)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionRBLProcessor, info=LlavaOnevisionRBLInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class LlavaOnevisionRBL(RBLModel, LlavaOnevisionForConditionalGeneration):
    hf_to_vllm_mapper = either_layout(LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper)
