"""What each family's model of digits is shown, and how large: pixels, patches, tiles, frames."""

from __future__ import annotations

import itertools

import numpy as np


PATCH, GLYPH, CELL = 14, 28, 7  # pixels: a vision patch, a digit's side, the lattice on which things are placed
MERGED = 2  # Qwen3-VL makes one token of so many patches a side: a digit is one, as in a pooled frame of a video
FRAMES = 6
KINDS = {
    "llava": ("image",),
    "llava_next": ("image",),
    "llava_onevision": ("images", "video"),
    "qwen3_vl": ("image",),
}
# Side, in pixels, of what images are made of: tiles, one or several; of Qwen3-VL's, the pixels behind one visual token.
TILE = {"llava": 168, "llava_next": 112, "llava_onevision": 112, "qwen3_vl": PATCH * MERGED}
# Rows and columns of these in an image, each as often as another unless SHARES says otherwise. LLaVA-NeXT's images are
# tall, so that left and right are the same in a tile and in the image. With columns of tiles a language model this
# small did not learn, in this time, the order of digits (docs/results/testbed.md). Qwen3-VL's are of any shape.
GRIDS = {
    "llava": ((1, 1),),
    "llava_next": ((2, 1), (3, 1)),
    "llava_onevision": ((1, 1),),
    "qwen3_vl": tuple(itertools.product(range(6, 10), repeat=2)),
}
SHARES = {"llava_next": (0.6, 0.4)}
# Those of the first part of a training: they cost less, and teach the digits.
SMALL_GRIDS = {"llava_next": ((1, 1),), "qwen3_vl": tuple(itertools.product(range(4, 7), repeat=2))}


def draw_size(random: np.random.Generator, family: str) -> tuple[int, int]:
    """Height and width of an image, in pixels."""
    grids = GRIDS[family]
    return size_of(family, grids[int(random.choice(len(grids), p=SHARES.get(family)))] if len(grids) > 1 else grids[0])


def draw_small_size(random: np.random.Generator, family: str) -> tuple[int, int]:
    grids = SMALL_GRIDS[family]
    return size_of(family, grids[int(random.integers(len(grids)))])


def size_of(family: str, grid: tuple[int, int]) -> tuple[int, int]:
    return grid[0] * TILE[family], grid[1] * TILE[family]


def step_of(family: str) -> int:
    """Digits lie at multiples of so many patches, so that whole visual tokens show them."""
    return MERGED if family == "qwen3_vl" else 1
