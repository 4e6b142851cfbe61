"""Qwen2.5-VL and Qwen3-VL in vLLM: native resolution, positions in three dimensions, deepstack.

A kept token's position is known once it is encoded. vLLM asks for positions a second time where its own video pruning
is on (`SupportsMultiModalPruning`), but not on a CPU, and not on every rank. So what is missing by then is written
beside the embeddings, where Qwen3-VL has its deepstack features, and added as the language model runs.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..models.layout import VisualLayout
from ..models.seam import MODALITIES, PIXELS
from .served_positions import Run, attach, detach, known_positions, offsets, runs_of
from .vllm_models import RBLInfo, RBLModel, RBLProcessor, flat_part


class GridInfo(RBLInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """vLLM normalises a video's pixels on the device by the numbers of the image processor: no videos where those
        of the video processor are others."""
        limits, processor = super().get_supported_mm_limits(), self.get_hf_processor()
        numbers = [
            [getattr(part, name, None) for name in ("image_mean", "image_std", "rescale_factor")]
            for part in (processor.image_processor, processor.video_processor)
        ]
        return limits if numbers[0] == numbers[1] else {**limits, "video": 0}

    def get_num_image_tokens(self, **size: Any) -> int:
        return self._kept("image", **size)

    def get_num_video_tokens(self, **size: Any) -> int:
        return self._kept("video", **size)

    def _kept(self, modality: str, **size: Any) -> int:
        resized, unpruned = self._get_vision_info(**size, modality=modality)
        tower = self.get_hf_config().vision_config
        rows, columns = resized.height // tower.patch_size, resized.width // tower.patch_size
        frames = unpruned * tower.spatial_merge_size**2 // (rows * columns)
        return self.layouts.of_grid(modality, (frames, rows, columns)).kept_count(self.pruning)


class GridProcessor(RBLProcessor):
    def layouts_of(self, mm_items: Any, data: Any) -> Mapping[str, list[VisualLayout]]:
        layouts = {}
        for modality in MODALITIES:
            if f"{modality}_embeds" in data and self.info.pruning.enabled:
                raise ValueError(
                    f"{modality}_embeds hold a whole {modality} in this family, whose positions are those of its grid: "
                    "send the pixels, or switch pruning off in the engine."
                )
            if PIXELS[modality] in data:
                grids = data[f"{modality}_grid_thw"].tolist()
                layouts[modality] = [self.info.layouts.of_grid(modality, tuple(grid)) for grid in grids]
        return layouts


class GridModel(RBLModel):
    """Offsets of kept tokens from their known positions travel with the tokens."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.pruning.enabled:
            refuse_beside_pruning(vllm_config)
        most = vllm_config.scheduler_config.max_num_batched_tokens
        # Of fixed addresses, as all that a captured CUDA graph reads. Between steps the offsets are zero.
        self.register_buffer("offsets", torch.zeros(3, most, dtype=torch.long), persistent=False)
        self.register_buffer("places", torch.zeros(3, most, dtype=torch.long), persistent=False)

    def get_encoder_cudagraph_config(self) -> Any:
        config = super().get_encoder_cudagraph_config()
        config.modalities = []  # a captured tower would pass embed_multimodal by
        return config

    def part_of(self, visual: Mapping[str, Any], modality: str, part: slice) -> dict[str, Any]:
        pixels, grids = PIXELS[modality], visual[f"{modality}_grid_thw"]
        others = {name: value[part] for name, value in visual.items() if name != pixels}
        return {**others, pixels: flat_part(visual[pixels], grids.prod(-1), part)}

    def belongs(self, name: str, modality: str) -> bool:
        of_video = "video" in name or name in ("second_per_grid_ts", "timestamps")
        return of_video == (modality == "video")

    def chosen_outside(self, kwargs: Mapping[str, Any]) -> Any:
        return super(RBLModel, self).embed_multimodal(**kwargs)

    def placed(self, kept: list[tuple[torch.Tensor, torch.Tensor]], modality: str, visual: Any) -> list[torch.Tensor]:
        if not self.pruning.enabled:
            return super().placed(kept, modality, visual)
        grids = visual[f"{modality}_grid_thw"].tolist()
        seconds = visual.get("second_per_grid_ts") if modality == "video" else None
        placed = []
        for (tokens, mask), grid, second in zip(kept, grids, [1.0] * len(grids) if seconds is None else seconds):
            place = offsets(self.times(grid[0], second), self.shape(grid))
            placed.append(attach(tokens, place.to(mask.device)[mask]))
        return placed

    def shape(self, grid: list[int]) -> tuple[int, int]:
        """Rows and columns of tokens of a frame."""
        merge = self.config.vision_config.spatial_merge_size
        return grid[1] // merge, grid[2] // merge

    def times(self, frames: int, seconds: Any) -> list[int]:
        """Time of each frame from the first position of its run, where one is to the next as many `seconds`."""
        raise NotImplementedError

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        if not self.pruning.enabled:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        runs: list[Run] = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            where, data = feature.mm_position, feature.data
            visual = torch.ones(where.length, dtype=torch.bool) if where.is_embed is None else where.is_embed.bool()
            grid, seconds = data[f"{feature.modality}_grid_thw"].data.tolist(), data.get("second_per_grid_ts")
            times = self.times(grid[0], 1.0 if seconds is None else seconds.data)
            runs += runs_of(where.offset, visual, times, self.shape(grid))
        positions = known_positions(len(input_tokens), runs)
        return positions, int(positions[0, -1]) + 1 - len(input_tokens)  # a prompt ends in text

    def embed_input_ids(
        self, input_ids: torch.Tensor, multimodal_embeddings: Any = None, *, is_multimodal: torch.Tensor | None = None
    ) -> torch.Tensor:
        given: Any = () if multimodal_embeddings is None or is_multimodal is None else multimodal_embeddings
        if self.pruning.enabled and len(given) and is_multimodal is not None:
            parts = [detach(tokens) for tokens in given]
            places, where = torch.cat([places for _, places in parts]), is_multimodal.to(self.offsets.device)
            for axis in (0, 1):
                self.offsets[1 + axis, : len(where)].masked_scatter_(where, places[:, axis])
            multimodal_embeddings = [tokens for tokens, _ in parts]
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.pruning.enabled:
            count = positions.shape[-1]
            positions = torch.add(positions, self.offsets[:, :count], out=self.places[:, :count])
            self.offsets.zero_()
        return super().forward(input_ids, positions, *args, **kwargs)


def refuse_beside_pruning(vllm_config: VllmConfig) -> None:
    """What would run under positions that are not whole."""
    pruned_by_vllm = vllm_config.model_config.multimodal_config.video_pruning_rate
    parallel = vllm_config.parallel_config
    refused = {
        "Speculative decoding": vllm_config.speculative_config is not None,
        "Pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "Prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "A step in two micro-batches": parallel.use_ubatching,
        "--video-pruning-rate, vLLM's own pruning,": bool(pruned_by_vllm),
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(f"{what} is not served with pruning in families with m-RoPE positions.")


class Qwen2_5_VLRBLInfo(GridInfo, Qwen2_5_VLProcessingInfo):
    pass


class Qwen3VLRBLInfo(GridInfo, Qwen3VLProcessingInfo):
    pass


class Qwen2_5_VLRBLProcessor(GridProcessor, Qwen2_5_VLMultiModalProcessor):
    pass


class Qwen3VLRBLProcessor(GridProcessor, Qwen3VLMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2_5_VLRBLProcessor, info=Qwen2_5_VLRBLInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class Qwen2_5_VLForConditionalGenerationRBL(GridModel, Qwen2_5_VLForConditionalGeneration):
    def times(self, frames: int, seconds: Any) -> list[int]:
        interval = torch.as_tensor(seconds, dtype=torch.float32).cpu() * self.config.vision_config.tokens_per_second
        return (torch.arange(frames) * interval).long().tolist()


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLRBLProcessor, info=Qwen3VLRBLInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class Qwen3VLForConditionalGenerationRBL(GridModel, Qwen3VLForConditionalGeneration):
    def times(self, frames: int, seconds: Any) -> list[int]:
        return [0] * frames  # time is text, between the frames
