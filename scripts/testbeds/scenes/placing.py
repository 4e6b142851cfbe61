"""One scene: things placed on a background, clutter around them, and what each patch shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .concepts import CONCEPTS, LABELS, STYLES, withheld_style
from .drawings import drawn
from .photos import draw_background, draw_clutter
from .splits import belongs


SIDE, PATCH = 168, 14
GRID = SIDE // PATCH
ANGLES = (-12, -6, 0, 0, 6, 12)


@dataclass
class Scene:
    """
    Args:
        image (`np.ndarray` of shape `(side, side, 3)`): uint8.
        things (`list[tuple[str, float, float]]`): name and centre (y, x) in pixels, from top to bottom.
        background (`str`): one of `BACKGROUNDS`.
        label (`np.ndarray` of shape `(grid, grid)`): what each patch shows most, a number of `LABELS`.
        cover (`np.ndarray` of shape `(grid, grid)`): share of each patch that things cover.
    """

    image: np.ndarray
    things: list[tuple[str, float, float]]
    background: str
    label: np.ndarray
    cover: np.ndarray


def draw_scene(random: np.random.Generator, split: str, count: int, withheld: bool = False, grid: int = GRID) -> Scene:
    """A scene of `count` things of a split, of `grid` patches a side.

    With `withheld` all are shown in drawings that no training scene has (and only things that have such a drawing)."""
    while True:
        scene = place_things(random, split, draw_names(random, split, count, withheld), withheld, grid)
        if scene is not None:
            return scene


def draw_count(random: np.random.Generator) -> int:
    return 1 + int(random.choice(4, p=[0.25, 0.35, 0.25, 0.15]))


def draw_names(random: np.random.Generator, split: str, count: int, withheld: bool) -> list[str]:
    """A composition of the split; more things than four are of a crowd, which only training has."""
    pool = [name for name in CONCEPTS if withheld_style(name)] if withheld else list(CONCEPTS)
    while True:
        names = [pool[index] for index in random.choice(len(pool), count, replace=False)]
        if belongs(names, split):
            return names


def place_things(random: np.random.Generator, split: str, names: list[str], withheld: bool, grid: int) -> Scene | None:
    """None where there is no room."""
    side = grid * PATCH
    image, word = draw_background(random, split, side)
    label = np.full((grid, grid), LABELS.index(word))
    busy, cover = np.zeros((side, side), bool), np.zeros((grid, grid), np.float32)
    placed = []
    for name in names:
        kept_back = withheld_style(name)
        style = kept_back if withheld else str(random.choice([style for style in STYLES if style != kept_back]))
        angle = ANGLES[int(random.integers(len(ANGLES)))]
        picture = drawn(name, style, int(random.integers(17, 27)) * 2, angle, bool(random.random() < 0.5))
        place = find_room(random, busy, *picture.shape[:2])
        if place is None:
            return None
        placed.append((name, picture, *place))
    for _ in range(round(random.integers(3, 9) * (grid / GRID) ** 2)):
        paint, mask = draw_clutter(random, split)
        place = find_room(random, busy, *mask.shape, tries=6)
        if place is not None:
            lay(image, paint, mask, *place)
            label[covered(mask, *place, grid) > 0.2] = LABELS.index("clutter")
    for name, picture, y, x in placed:
        colours = picture[..., :3] * random.uniform(0.88, 1.1, 3).astype(np.float32) + random.uniform(-10, 10)
        alpha = picture[..., 3].astype(np.float32) / 255
        lay(image, colours, alpha, y, x)
        share = covered(alpha, y, x, grid)
        label[(share > 0.2) & (share > cover)] = LABELS.index(name)
        np.maximum(cover, share, out=cover)
    things = [(name, y + picture.shape[0] / 2, x + picture.shape[1] / 2) for name, picture, y, x in placed]
    things.sort(key=lambda thing: thing[1])
    return Scene(np.round(image.clip(0, 255)).astype(np.uint8), things, word, label, cover)


def find_room(
    random: np.random.Generator, busy: np.ndarray, height: int, width: int, tries: int = 60
) -> tuple[int, int] | None:
    """Where a box of this size overlaps nothing; marks it, with a margin, as taken."""
    for _ in range(tries):
        y, x = int(random.integers(len(busy) - height + 1)), int(random.integers(len(busy) - width + 1))
        if not busy[y : y + height, x : x + width].any():
            busy[max(0, y - 3) : y + height + 3, max(0, x - 3) : x + width + 3] = True
            return y, x
    return None


def lay(image: np.ndarray, paint: np.ndarray, mask: np.ndarray, y: int, x: int) -> None:
    """Paints over the image where the mask says so."""
    part = image[y : y + mask.shape[0], x : x + mask.shape[1]]
    part += (paint - part) * mask[..., None]


def covered(mask: np.ndarray, y: int, x: int, grid: int) -> np.ndarray:
    """`(grid, grid)`: the share of each patch under a mask that lies at (y, x)."""
    whole = np.zeros((grid * PATCH, grid * PATCH), np.float32)
    whole[y : y + mask.shape[0], x : x + mask.shape[1]] = mask
    return whole.reshape(grid, PATCH, grid, PATCH).mean((1, 3))
