"""FAMILIES, the list of families that this library is tested with, and the kinds of them.

With `family.py` and `llava_family.py` the only readers of family config names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .family import CHUNKS, COPIES, UNTYPED, Arguments, Family, grid_side
from .layout import VisualLayout
from .llava_family import LlavaFamily, LlavaNextFamily, LlavaNextVideoFamily, LlavaOnevisionFamily
from .seam import PIXELS


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class GridFamily(Family):
    """Native resolution: an image is one grid of merged patches, a video one grid per temporal patch."""

    mrope: bool = True

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout]:
        merge, layouts = model.config.vision_config.spatial_merge_size, []
        patches, pixels = int(self._grids(modality, arguments).prod(-1).sum()), len(arguments[PIXELS[modality]])
        if patches != pixels:
            raise ValueError(f"{PIXELS[modality]} holds {pixels} patches, but {modality}_grid_thw says {patches}.")
        for frames, rows, columns in self._grids(modality, arguments).tolist():
            grid = (rows // merge, columns // merge)
            layouts.append(VisualLayout.of_patches(frames * grid[0] * grid[1], frames, grid))
        return layouts

    def select(self, model: Any, modality: str, arguments: Arguments, indices: list[int]) -> Arguments:
        grids = self._grids(modality, arguments)
        pixels = arguments[PIXELS[modality]].split(grids.prod(-1).tolist())
        chosen = torch.cat([pixels[index] for index in indices])
        return {**arguments, PIXELS[modality]: chosen, f"{modality}_grid_thw": grids[indices]}

    def _grids(self, modality: str, arguments: Arguments) -> torch.Tensor:
        name = f"{modality}_grid_thw"
        if arguments.get(name) is None:
            raise ValueError(
                f"{name} is missing beside {PIXELS[modality]}: pass everything that the processor returns."
            )
        return torch.as_tensor(arguments[name])


@dataclass(frozen=True)
class ShapedFamily(Family):
    """Native resolution without positions in three dimensions: the processor tells the shape of every image or tile.

    Args:
        shapes (`Callable`): `(config, arguments)` gives rows and columns of tokens per image; None if it is not told.
    """

    shapes: Callable[[PreTrainedConfig, Arguments], torch.Tensor | None] = lambda config, arguments: None

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout] | None:
        shapes = self.shapes(model.config, arguments) if modality == "image" else None
        if shapes is None:
            return None
        return [VisualLayout.of_patches(rows * columns, grid=(rows, columns)) for rows, columns in shapes.tolist()]


def _lfm2_shapes(config: PreTrainedConfig, arguments: Arguments) -> torch.Tensor | None:
    patches = arguments.get("spatial_shapes")
    return None if patches is None else torch.as_tensor(patches) // config.downsample_factor


def _kimi_shapes(config: PreTrainedConfig, arguments: Arguments) -> torch.Tensor | None:
    grids = arguments.get("image_grid_thw")
    kernel = config.vision_config.merge_kernel_size
    return None if grids is None else torch.as_tensor(grids)[:, 1:].cpu() // torch.as_tensor(kernel)


def _gemma4_shapes(config: PreTrainedConfig, arguments: Arguments) -> torch.Tensor | None:
    places = arguments.get("image_position_ids")  # (x, y) of each patch, -1 at padding
    kernel = config.vision_config.pooling_kernel_size
    return None if places is None else (torch.as_tensor(places).amax(1) + 1).flip(-1) // kernel


def tiles_of(length: Callable[[PreTrainedConfig], int]) -> Callable[[PreTrainedConfig, int], list[int]]:
    """`units` of a family whose entries hold any number of tiles of one length."""
    return lambda config, tokens: [length(config)] * (tokens // length(config))


_idefics_tiles = tiles_of(lambda config: grid_side(config) ** 2 // config.scale_factor**2)

_BOTH_WAYS = {CHUNKS: "visual tokens attend to each other both ways, and a chunk may end among them"}

_MIXED = {COPIES: "the stock class repeats images one by one and mixes those of a prompt"}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LlavaFamily("llava"),
        LlavaNextFamily("llava_next"),
        LlavaNextVideoFamily("llava_next_video"),
        LlavaOnevisionFamily("llava_onevision"),
        GridFamily("qwen2_vl", projector="visual"),
        GridFamily("qwen2_5_vl", projector="visual"),
        GridFamily("qwen3_vl", projector="visual"),
        GridFamily("qwen3_vl_moe", projector="visual"),
        GridFamily("qwen3_5", projector="visual"),
        GridFamily("qwen3_5_moe", projector="visual"),
        GridFamily("glm4v", projector="visual", video_as_image=True, refuses=_MIXED),
        GridFamily("glm46v", projector="visual", video_as_image=True, refuses=_MIXED),
        Family("internvl", stacked=True, runs=True, tiled=True),
        Family("gemma3", stacked=True, refuses=_BOTH_WAYS),
        ShapedFamily("gemma4", projector="embed_vision", refuses=_BOTH_WAYS, shapes=_gemma4_shapes),
        Family(
            "paligemma",
            stacked=True,
            refuses={**_BOTH_WAYS, UNTYPED: "without it, PaliGemma's attention depends on whether a prompt is padded"},
        ),
        Family("smolvlm", projector="connector", stacked=True, units=_idefics_tiles, tiled=True),
        Family("idefics3", projector="connector", stacked=True, units=_idefics_tiles, tiled=True),
        Family("mistral3"),
        Family("aya_vision", stacked=True, tiled=True),
        Family("cohere2_vision", stacked=True, tiled=True),
        Family("vipllava", stacked=True),
        Family("got_ocr2", stacked=True, runs=True, tiled=True),
        ShapedFamily("lfm2_vl", shapes=_lfm2_shapes, tiled=True),
        Family("deepseek_vl", projector="aligner", stacked=True),
        Family(
            "ovis2",
            projector="visual_embeddings_table",
            stacked=True,
            tiled=True,
            refuses={CHUNKS: "the stock class cannot split its visual indicators over chunks"},
        ),
        ShapedFamily("kimi_k25", projector="mm_projector", shapes=_kimi_shapes),
    )
}
