"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision in vLLM."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from vllm.multimodal.parse import ImageProcessorItems

from ..models.layout import VisualLayout
from .vllm_models import RBLInfo, RBLModel, RBLProcessor


class TiledInfo(RBLInfo):
    """`stock` is the class that this one is mixed into."""

    stock: Any

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


class TiledProcessor(RBLProcessor):
    def layouts_of(self, mm_items: Any, data: Any) -> Mapping[str, list[VisualLayout]]:
        if "pixel_values" not in data:
            return {}
        pruning = self.info.pruning
        if pruning.enabled and pruning.tiles == "base" and data["pixel_values"][0].ndim == 4:
            data["pixel_values"] = [tiles[:1] for tiles in data["pixel_values"]]
        images = mm_items.get_items("image", ImageProcessorItems)
        sizes = [images.get_image_size(index) for index in range(len(images))]
        return {"image": [self.info.layout(size.width, size.height) for size in sizes]}


def either_layout(stock: WeightsMapper) -> WeightsMapper:
    """Weights as transformers 5 writes them, whose vision towers have no `vision_model.` level, and as before."""
    prefixes = dict(stock.orig_to_new_prefix)
    for part in ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head."):
        prefixes[f"vision_tower.{part}"] = f"vision_tower.vision_model.{part}"
        prefixes[f"model.vision_tower.{part}"] = f"vision_tower.vision_model.{part}"
    return WeightsMapper(orig_to_new_prefix=prefixes)


class LlavaRBLInfo(TiledInfo, LlavaProcessingInfo):
    stock = LlavaProcessingInfo


class LlavaNextRBLInfo(TiledInfo, LlavaNextProcessingInfo):
    stock = LlavaNextProcessingInfo


class LlavaOnevisionRBLInfo(TiledInfo, LlavaOnevisionProcessingInfo):
    stock = LlavaOnevisionProcessingInfo


class LlavaRBLProcessor(TiledProcessor, LlavaMultiModalProcessor):
    pass


class LlavaNextRBLProcessor(TiledProcessor, LlavaNextMultiModalProcessor):
    pass


class LlavaOnevisionRBLProcessor(TiledProcessor, LlavaOnevisionMultiModalProcessor):
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
