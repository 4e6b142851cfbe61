"""One image or video as each family's processor would hand it over, for `benchmark_prefill.py --preset small`: the same
language model of 8 layers behind the family's own kind of tower, its own patches, and its own marks.

A `Shape` is a config without its sizes, and one prompt's picture: tensors, and the ids that stand for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


# Ids of placeholders and marks; words come later.
IMAGE, VIDEO, START, END, BREAK, VIDEO_START, VIDEO_END = range(3, 10)
Draw = Callable[..., torch.Tensor]  # random pixels of a shape


@dataclass(frozen=True)
class Picture:
    """What a processor returns for one image or video.

    Args:
        ids (`list[int]`): its placeholders with the marks around them.
        tensors (`dict[str, torch.Tensor]`): pixels, and what is said of them; a batch has them one after the other.
        types (`str`, *optional*): the argument that tells placeholders from text.
        prefix (`bool`): that argument is 0 all along a first prompt.
    """

    ids: list[int]
    tensors: dict[str, torch.Tensor]
    types: str | None = None
    prefix: bool = False


@dataclass(frozen=True)
class Shape:
    """How a family's config names things, and its picture.

    Args:
        vision (`dict`): of the vision config, beside its sizes.
        picture (`Callable`): `draw -> Picture`.
        settings (`dict`): of the whole config.
        text (`dict`): of the text config, beside its sizes.
        names (`dict`): the tower's names for `num_hidden_layers` and `num_attention_heads`, where it has its own.
    """

    vision: dict[str, Any]
    picture: Callable[[Draw], Picture]
    settings: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def config(self, config_class: type, sizes: dict[str, dict[str, int]]) -> Any:
        """The family's config with these sizes of tower and language model."""
        vision = {self.names.get(name, name): value for name, value in sizes["vision"].items()}
        text = {**sizes["text"], "max_position_embeddings": 32768, "pad_token_id": 0, **self.text}
        ids = {"image_token_id": IMAGE, "image_token_index": IMAGE, "tie_word_embeddings": False}
        return config_class(vision_config={**vision, **self.vision}, text_config=text, **{**ids, **self.settings})


def tiles(count: int, tokens: int, side: int, before: tuple[int, ...] = (), joined: bool = False, **about: Any
          ) -> Callable[[Draw], Picture]:  # fmt: skip
    """An image cut into tiles, with marks of the text before each; `joined` pixels have one row a prompt."""

    def picture(draw: Draw) -> Picture:
        pixels = draw(count, 3, side, side)
        ids = [START, *[*before, *[IMAGE] * tokens] * count, END]
        return Picture(ids, {"pixel_values": pixels[None] if joined else pixels}, **about)

    return picture


def native(side: int, patch: int) -> Callable[[Draw], Picture]:
    """Qwen-VL's: `side` x `side` patches, four of which are one token."""

    def picture(draw: Draw) -> Picture:
        tensors = {
            "pixel_values": draw(side**2, 3 * 2 * patch**2),
            "image_grid_thw": torch.tensor([[1, side, side]]),
        }
        return Picture([START, *[IMAGE] * (side // 2) ** 2, END], tensors, "mm_token_type_ids")

    return picture


def rows_with_marks(draw: Draw, rows: int = 24, patch: int = 14) -> Picture:
    """Mistral 3's: each row of merged patches ends in a mark of the text."""
    side = 2 * patch * rows
    ids = ([IMAGE] * rows + [BREAK]) * rows
    return Picture(
        [*ids[:-1], END], {"pixel_values": draw(1, 3, side, side), "image_sizes": torch.tensor([[side, side]])}
    )


def shaped_tiles(draw: Draw, count: int = 4, side: int = 32, patch: int = 16) -> Picture:
    """LFM2-VL's: tiles of flat patches, each with its shape, behind marks."""
    tensors = {
        "pixel_values": draw(count, side**2, 3 * patch**2),
        "pixel_attention_mask": torch.ones(count, side**2, dtype=torch.long),
        "spatial_shapes": torch.tensor([[side, side]] * count),
    }
    return Picture([START, *[BREAK, *[IMAGE] * (side // 2) ** 2] * count, END], tensors)


def frames(count: int, tokens: int, side: int) -> Callable[[Draw], Picture]:
    """LLaVA-NeXT-Video's: frames side by side."""
    return lambda draw: Picture([VIDEO] * (count * tokens), {"pixel_values_videos": draw(1, count, 3, side, side)})


SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
CLIP = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
MARKS = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
NAMES = {"num_hidden_layers": "depth", "num_attention_heads": "num_heads"}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 8, 8]}
MERGED = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 512}

SHAPES = {
    "vipllava": Shape(CLIP, tiles(1, 576, 336), {"vision_feature_layers": [-2, -3], "vision_feature_layer": [-2, -3]}),
    "llava_next_video": Shape(
        CLIP,
        frames(8, 144, 336),
        {"video_token_index": VIDEO, "video_token_id": VIDEO, "image_grid_pinpoints": [[336, 672]]},
    ),
    "internvl": Shape(
        {"image_size": [448, 448], "patch_size": [14, 14]},
        tiles(5, 256, 448),
        {"downsample_ratio": 0.5, "image_seq_length": 256},
        {"model_type": "qwen2"},
    ),
    "smolvlm": Shape(
        {"image_size": 512, "patch_size": 16},
        tiles(5, 256, 512, (BREAK,), joined=True),
        {"scale_factor": 2, "pad_token_id": 0},
        {"model_type": "llama"},
    ),
    "cohere2_vision": Shape(
        {**SIGLIP, "image_size": 512, "patch_size": 16},
        tiles(5, 256, 512),
        {"downsample_factor": 2, "alignment_intermediate_size": 2048},
        {"model_type": "cohere2", "sliding_window": 4096},
    ),
    "aya_vision": Shape(
        {**SIGLIP, "image_size": 364, "patch_size": 14},
        tiles(5, 169, 364, (BREAK,)),
        {"downsample_factor": 2, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        {"model_type": "cohere2", "sliding_window": 4096},
    ),
    "gemma3": Shape(
        {**SIGLIP, "image_size": 448, "patch_size": 14},
        tiles(4, 256, 448, types="token_type_ids"),
        {"mm_tokens_per_image": 256, "boi_token_index": START, "eoi_token_index": END},
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 1024},
    ),
    "paligemma": Shape(
        {**SIGLIP, "image_size": 448, "patch_size": 14, "projection_dim": 512},
        tiles(1, 1024, 448, types="token_type_ids", prefix=True),
        {"projection_dim": 512, "hidden_size": 512},
        {"model_type": "gemma", "head_dim": 64},
    ),
    "mistral3": Shape(
        {"model_type": "pixtral", "image_size": 1540, "patch_size": 14, "head_dim": 64},
        rows_with_marks,
        {"spatial_merge_size": 2, "vision_feature_layer": -1},
        {"model_type": "mistral", "head_dim": 64, "sliding_window": None},
    ),
    "lfm2_vl": Shape(
        {"model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 1024, "vision_use_head": False},
        shaped_tiles,
        {"downsample_factor": 2, "projector_hidden_size": 512},
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 4},
    ),
    "qwen2_5_vl": Shape(
        {**MERGED, "window_size": 112, "fullatt_block_indexes": [2, 5]},
        native(48, 14),
        MARKS,
        {"rope_parameters": ROPE},
        NAMES,
    ),
    "glm4v": Shape(
        {**MERGED, "image_size": 336},
        native(48, 14),
        {
            "video_token_id": VIDEO,
            "image_start_token_id": START,
            "image_end_token_id": END,
            "video_start_token_id": VIDEO_START,
            "video_end_token_id": VIDEO_END,
        },
        {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
        NAMES,
    ),
}
