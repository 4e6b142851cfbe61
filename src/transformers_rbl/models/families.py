"""FAMILIES, the list of families that this library is tested with, and the kinds of them.

With `family.py` and `llava_family.py` the only readers of family config names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .family import CHUNKS, COPIES, UNTYPED, VIDEOS, Arguments, Family, grid_side
from .layout import BASE, PATCH, VisualLayout
from .llava_family import (
    LlavaFamily,
    LlavaNextFamily,
    LlavaNextVideoFamily,
    LlavaOnevisionFamily,
    cls_cosines,
    stopped_behind,
)
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

    def frames(self, model: Any, arguments: Arguments) -> list[torch.Tensor]:
        """Temporal patches: the tower's attention does not leave one."""
        grids = self._grids("video", arguments)
        videos = arguments[PIXELS["video"]].split(grids.prod(-1).tolist())
        return [video.unflatten(0, (count, -1)) for video, count in zip(videos, grids[:, 0].tolist())]

    def select_frames(self, model: Any, arguments: Arguments, indices: list[list[int]]) -> Arguments:
        grids = self._grids("video", arguments).clone()
        grids[:, 0] = torch.tensor([len(own) for own in indices])
        chosen = [video[own].flatten(0, 1) for video, own in zip(self.frames(model, arguments), indices, strict=True)]
        return {**arguments, PIXELS["video"]: torch.cat(chosen), "video_grid_thw": grids}

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
        shapes (`Callable`): `(config, modality, arguments)` gives rows and columns of tokens per image, tile or frame;
            None if it is not told.
    """

    shapes: Callable[[PreTrainedConfig, str, Arguments], torch.Tensor | None] = lambda config, modality, arguments: None

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout] | None:
        shapes = self.shapes(model.config, modality, arguments)
        if shapes is None:
            return None
        frames = arguments.get("num_frames_per_video") if modality == "video" else None
        counts = [1] * len(shapes) if frames is None else torch.as_tensor(frames).tolist()
        firsts = [frame[0].tolist() for frame in shapes.split(counts)]  # the frames of a video have one shape
        return [VisualLayout.of_patches(n * r * c, n, (r, c)) for n, (r, c) in zip(counts, firsts)]


def _lfm2_shapes(config: PreTrainedConfig, modality: str, arguments: Arguments) -> torch.Tensor | None:
    patches = arguments.get("spatial_shapes")
    return None if patches is None else torch.as_tensor(patches) // config.downsample_factor


def _kimi_shapes(config: PreTrainedConfig, modality: str, arguments: Arguments) -> torch.Tensor | None:
    grids = arguments.get(f"{modality}_grid_thw")  # time is averaged away
    kernel = config.vision_config.merge_kernel_size
    return None if grids is None else torch.as_tensor(grids)[:, 1:].cpu() // torch.as_tensor(kernel)


def _gemma4_shapes(config: PreTrainedConfig, modality: str, arguments: Arguments) -> torch.Tensor | None:
    places = arguments.get(f"{modality}_position_ids")  # (x, y) of each patch, -1 at padding
    kernel = config.vision_config.pooling_kernel_size
    return None if places is None else (torch.as_tensor(places).amax(-2) + 1).flip(-1) // kernel


@dataclass(frozen=True)
class Molmo2Family(Family):
    """Molmo 2: a thumbnail, then one grid over all crops; rows of both end with marks in text."""

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout]:
        grids = torch.as_tensor(arguments[f"{modality}_grids"]).tolist()
        if modality == "video":
            return [VisualLayout.of_patches(n * rows * columns, n, (rows, columns)) for n, rows, columns in grids]
        return [
            VisualLayout(
                torch.tensor([BASE] * rows * columns + [PATCH] * tile_rows * tile_columns), grid=(rows, columns)
            )
            for rows, columns, tile_rows, tile_columns in grids
        ]

    def encode_base(self, model: Any, arguments: Arguments, layouts: list[VisualLayout]) -> Any:
        """A thumbnail is its image's first crop, and pooled by itself."""
        pixels, pooling = arguments[PIXELS["image"]], torch.as_tensor(arguments["image_token_pooling"])
        grids, patches = torch.as_tensor(arguments["image_grids"]).clone(), pixels.shape[-2]
        own = torch.cat([layout.kinds for layout in layouts]).to(pooling.device) == BASE
        grids[:, 2:] = 0
        pooled = pooling[own].split(grids[:, :2].prod(-1).tolist())
        crops = torch.stack([rows.amax() // patches for rows in pooled])
        moved = [rows.where(rows < 0, rows % patches + patches * place) for place, rows in enumerate(pooled)]
        thumbnails = {PIXELS["image"]: pixels.flatten(0, -3)[crops], "image_token_pooling": torch.cat(moved)}
        return self.encode(model, "image", {**arguments, **thumbnails, "image_grids": grids})


@dataclass(frozen=True)
class PerceptionLMFamily(Family):
    """Perception LM: pixels `(images, tiles, 3, h, w)`, the thumbnail first."""

    def layouts(self, model: Any, modality: str, arguments: Arguments) -> list[VisualLayout]:
        images, tiles = arguments[PIXELS["image"]].shape[:2]
        patch = model.vision_tower.timm_model.patch_embed.patch_size[0]
        side = arguments[PIXELS["image"]].shape[-1] // patch // model.config.projector_pooling_ratio
        kinds = torch.full((tiles, side**2), PATCH)
        if tiles > 1:
            kinds[0] = BASE
        return [VisualLayout(kinds.flatten(), grid=(side, side))] * images

    def encode_base(self, model: Any, arguments: Arguments, layouts: list[VisualLayout]) -> Any:
        return self.encode(model, "image", {**arguments, PIXELS["image"]: arguments[PIXELS["image"]][:, :1]})


@dataclass(frozen=True)
class VipLlavaFamily(Family):
    """VipLLaVA: as LLaVA-1.5, but several layers of the tower make a visual token."""

    def stopped(self, model: Any, arguments: Arguments) -> tuple[Any, Arguments]:
        renamed = "vision_feature_layers" in (model.config.attribute_map or {})  # by newer releases
        return stopped_behind(model, arguments, "vision_feature_layer" if renamed else "vision_feature_layers")

    def has_cls(self, model: Any) -> bool:
        return any(name.endswith("class_embedding") for name, _ in model.vision_tower.named_parameters())

    def cls_similarity(
        self, model: Any, modality: str, outputs: Any, arguments: Arguments, base_alone: bool
    ) -> list[torch.Tensor]:
        names = ("vision_feature_layer", "vision_feature_layers")  # of newer and older releases
        given = (arguments.get(name) for name in names)
        layers = next((layer for layer in given if layer is not None), model.config.vision_feature_layers)
        return list(cls_cosines(outputs.hidden_states, layers)[:, 1:, 0])


def tiles_of(length: Callable[[PreTrainedConfig], int]) -> Callable[[PreTrainedConfig, int], list[int]]:
    """`units` of a family whose entries hold any number of tiles of one length."""
    return lambda config, tokens: [length(config)] * (tokens // length(config))


def _internvl_tile(config: PreTrainedConfig) -> int:
    vision = config.vision_config
    return int(vision.image_size[0] // vision.patch_size[0] * config.downsample_ratio) ** 2


def _cohere2_tile(config: PreTrainedConfig) -> int:
    return (grid_side(config) // config.downsample_factor) ** 2


def _ovis2_tile(config: PreTrainedConfig) -> int:
    return (-(-grid_side(config) // config.vision_config.hidden_stride)) ** 2  # padded to whole strides


_idefics_tiles = tiles_of(lambda config: grid_side(config) ** 2 // config.scale_factor**2)

_BOTH_WAYS = {CHUNKS: "visual tokens attend to each other both ways, and a chunk may end among them"}

_TIMM = {CHUNKS: "the stock class cannot split what a tower of timm returns over chunks"}

_NO_VIDEO_ENCODER = "the stock class encodes them as images, and has no method of their own for it"

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
        GridFamily("paddleocr_vl", projector="projector"),
        Family("internvl", stacked=True, apart=0, tile_length=_internvl_tile),
        Family("gemma3", stacked=True, refuses=_BOTH_WAYS),
        ShapedFamily("gemma4", projector="embed_vision", refuses=_BOTH_WAYS, shapes=_gemma4_shapes),
        Family(
            "paligemma",
            stacked=True,
            refuses={**_BOTH_WAYS, UNTYPED: "without it, PaliGemma's attention depends on whether a prompt is padded"},
        ),
        Family("smolvlm", projector="connector", stacked=True, units=_idefics_tiles, tiled=True),
        Family("idefics3", projector="connector", stacked=True, units=_idefics_tiles, tiled=True),
        Family("mistral3", row_marks=True),
        Family("aya_vision", stacked=True, tiled=True),
        Family("cohere2_vision", stacked=True, apart=1, tile_length=_cohere2_tile),
        VipLlavaFamily("vipllava", stacked=True),
        Family("got_ocr2", stacked=True, apart=0, tiled=True),
        ShapedFamily("lfm2_vl", shapes=_lfm2_shapes, tiled=True),
        Family("deepseek_vl", projector="aligner", stacked=True),
        Family(
            "ovis2",
            projector="visual_embeddings_table",
            stacked=True,
            apart=1,
            tile_length=_ovis2_tile,
            thumbnail=0,
            refuses={CHUNKS: "the stock class cannot split its visual indicators over chunks"},
        ),
        ShapedFamily("kimi_k25", projector="mm_projector", shapes=_kimi_shapes),
        Molmo2Family("molmo2", row_marks=True, refuses=_BOTH_WAYS),
        Family("gemma3n", projector="embed_vision", stacked=True, refuses=_TIMM),
        Family("fast_vlm", stacked=True, refuses=_TIMM),
        PerceptionLMFamily("perception_lm", stacked=True, apart=0, refuses={**_TIMM, VIDEOS: _NO_VIDEO_ENCODER}),
    )
}
