"""InternVL in vLLM: checkpoints in Hugging Face's format (`OpenGVLab/…-hf`), which vLLM serves by its InternS1 class."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..models.layout import VisualLayout
from .vllm_models import RBLInfo, RBLModel, RBLProcessor, flat_part


class InternVLRBLInfo(RBLInfo, InternS1ProcessingInfo):
    def get_num_image_tokens(self, **size: Any) -> int:
        return self.layouts.of_tiles(super().get_num_image_tokens(**size)).kept_count(self.pruning)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_image_size_with_most_features(self) -> Any:
        # The image that memory is reserved for is the one of most unpruned tokens; pruned counts tie.
        return InternS1ProcessingInfo(self.ctx).get_image_size_with_most_features()


class InternVLRBLProcessor(RBLProcessor, InternS1MultiModalProcessor):
    def layouts_of(self, mm_items: Any, data: Any) -> Mapping[str, list[VisualLayout]]:
        if "pixel_values" not in data:
            return {}
        tile = self.info.get_hf_config().image_seq_length
        return {"image": [self.info.layouts.of_tiles(tile * int(count)) for count in data["image_num_patches"]]}


@MULTIMODAL_REGISTRY.register_processor(
    InternVLRBLProcessor, info=InternVLRBLInfo, dummy_inputs=InternS1DummyInputsBuilder
)
class InternVLForConditionalGenerationRBL(RBLModel, InternS1ForConditionalGeneration):
    def part_of(self, visual: Mapping[str, Any], modality: str, part: slice) -> dict[str, Any]:
        counts = visual["image_num_patches"]
        pixels = flat_part(visual["pixel_values"], counts, part)
        return {**visual, "pixel_values": pixels, "image_num_patches": counts[part]}
