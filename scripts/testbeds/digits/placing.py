"""Scenes: digits, decoys and blocks where chance puts them, and what each patch then shows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from .drawing import BLOCKS, DECOYS, bright_colour, decoy_shapes, draw_backdrop, draw_block
from .sizes import CELL, GLYPH, PATCH


BACKDROP = 10  # labels of patches: digits 0 to 9, backdrop, then decoys and blocks
LABELS = [*map(str, range(10)), "backdrop", *DECOYS, *BLOCKS]
SALIENT = (0.30, 0.45)  # share of the patches under decoys and blocks

Size = tuple[int, int]  # height and width, in pixels
Window = tuple[int, int, int, int]  # top, left, rows and columns, in patches
Placed = tuple[tuple[np.ndarray, int], tuple[int, int]]  # a glyph and its digit; y and x, in pixels


def draw_scene(
    random: np.random.Generator, split: str, size: Size, frames: Sequence[Sequence[Placed]]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Frames of one backdrop and one set of decoys, each with its digits.

    Returns:
        Images `(height, width, 3)` uint8, and the labels of their patches, `(rows, columns)`.
    """
    image = draw_backdrop(random, split, size)
    labels = np.full((size[0] // PATCH, size[1] // PATCH), BACKDROP)
    busy = np.zeros((size[0] // CELL, size[1] // CELL), bool)
    side = GLYPH // CELL
    for _, (y, x) in itertools.chain.from_iterable(frames):
        busy[y // CELL : y // CELL + side, x // CELL : x // CELL + side] = True
    add_decoys(random, split, image, labels, busy)
    images, labels_of_frames, colours = [], [], {}
    for frame in frames:
        drawn, shown = image.copy(), labels.copy()
        for (glyph, digit), (y, x) in frame:
            colour = colours.setdefault(id(glyph), bright_colour(random))
            paint(drawn, shown, glyph, y, x, colour, digit)
        images.append(np.round(np.clip(drawn, 0, 1) * 255).astype(np.uint8))
        labels_of_frames.append(shown)
    return images, labels_of_frames


def add_decoys(
    random: np.random.Generator, split: str, image: np.ndarray, labels: np.ndarray, busy: np.ndarray
) -> None:
    """Decoys and blocks wherever the lattice `(rows, columns)` bool is not `busy`, until enough patches show some."""
    wanted = random.uniform(*SALIENT)
    for _ in range(200):
        if (labels != BACKDROP).mean() >= wanted:
            return
        kind = int(random.integers(len(DECOYS) + len(DECOYS)))
        if kind < len(DECOYS):
            height, width = GLYPH, GLYPH
        else:
            height, width = (PATCH * int(side) for side in random.integers(2, 4, 2))
        rows, columns = height // CELL, width // CELL
        row, column = int(random.integers(busy.shape[0] - rows + 1)), int(random.integers(busy.shape[1] - columns + 1))
        if busy[row : row + rows, column : column + columns].any():
            continue
        busy[row : row + rows, column : column + columns] = True
        y, x = row * CELL, column * CELL
        if kind < len(DECOYS):
            variants = decoy_shapes()[DECOYS[kind]]
            mask = variants[int(random.integers(len(variants)))]
            paint(image, labels, mask, y, x, bright_colour(random), BACKDROP + 1 + kind)
        else:
            block = BLOCKS[int(random.integers(len(BLOCKS)))]
            texture = draw_block(random, split, block, height, width)
            label = BACKDROP + 1 + len(DECOYS) + BLOCKS.index(block)
            paint(image, labels, np.ones((height, width), np.float32), y, x, texture, label)


def paint(
    image: np.ndarray, labels: np.ndarray, mask: np.ndarray, y: int, x: int, colour: np.ndarray, label: int
) -> None:
    """Lay a colour over an image where a mask says, and its label over the patches that have some of it."""
    height, width = mask.shape
    part = image[y : y + height, x : x + width]
    part += (colour - part) * mask[..., None]
    for row in range(y // PATCH, (y + height - 1) // PATCH + 1):
        for column in range(x // PATCH, (x + width - 1) // PATCH + 1):
            top, left = max(row * PATCH - y, 0), max(column * PATCH - x, 0)
            ink = mask[top : (row + 1) * PATCH - y, left : (column + 1) * PATCH - x].sum()
            if ink > 0.02 * PATCH**2:
                labels[row, column] = label


def draw_window(random: np.random.Generator, size: Size, step: int = 1) -> Window:
    """A window of multiples of `step`: the whole image now and then, more often few rows and columns, a digit's at
    least."""
    rows, columns = (length // PATCH // step for length in size)
    if random.random() < 0.2:
        return 0, 0, rows * step, columns * step
    height, width = (int(random.integers(2 // step, most + 1, 2).min()) for most in (rows, columns))
    top, left = int(random.integers(rows - height + 1)), int(random.integers(columns - width + 1))
    return top * step, left * step, height * step, width * step


def draw_boxes(
    random: np.random.Generator, count: int, size: Size, window: Window | None, step: int = 1
) -> list[tuple[int, int]] | None:
    """Places `(y, x)` of digits from left to right, each of four whole patches, at multiples of `step` patches; none
    across two tiles. None if chance found no such places: a window may have none."""
    top, left, height, width = window or (0, 0, size[0] // PATCH, size[1] // PATCH)
    side, tile = GLYPH // PATCH, size[1]
    for _ in range(400):
        ys = PATCH * (top + step * random.integers(0, (height - side) // step + 1, count))
        xs = PATCH * np.sort(left + step * random.integers(0, (width - side) // step + 1, count))
        apart = all(
            abs(ys[i] - ys[j]) >= GLYPH or abs(xs[i] - xs[j]) >= GLYPH
            for i, j in itertools.combinations(range(count), 2)
        )
        if apart and (np.diff(xs) > 0).all() and (ys // tile == (ys + GLYPH - 1) // tile).all():
            return [(int(y), int(x)) for y, x in zip(ys, xs)]
    return None
