"""Which split a glyph, a region of a photo and a composition of digits belong to: one each, by hash."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np
from sklearn.datasets import load_digits

from ..testbed import SPLITS


def composition(random: np.random.Generator, split: str, count: int, distinct: bool = False) -> tuple[int, ...]:
    """Digits whose sequence belongs to the split; neighbours differ, or all of them."""
    while True:
        digits = tuple(int(digit) for digit in random.integers(0, 10, count))
        pairs = itertools.combinations(digits, 2) if distinct else itertools.pairwise(digits)
        if belongs(digits, split) and all(a != b for a, b in pairs):
            return digits


def belongs(digits: Sequence[int], split: str) -> bool:
    """Whether a composition is of the split: 80% of the sequences are train, 8% validation, 12% test. One digit alone
    may be in all of them."""
    return len(digits) == 1 or split_of(repr(tuple(digits)).encode(), 80, 88) == split


def split_of_glyph(image: np.ndarray) -> str:
    """Which split a digit's 8 x 8 picture belongs to: 70% train, 10% validation, 20% test; equal pictures to one."""
    return split_of(image.astype(np.uint8).tobytes(), 70, 80)


def photo_columns(split: str) -> tuple[float, float]:
    """From where to where a photo belongs to the split, in shares of its width."""
    return {"train": (0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1)}[split]


def split_of(content: bytes, train: int, validation: int) -> str:
    """The split of a content, if of every hundred contents those below `train` and `validation` are of these."""
    place = int(hashlib.sha256(content).hexdigest(), 16) % 100
    return SPLITS[(place >= train) + (place >= validation)]


@functools.cache
def glyph_indices(split: str) -> dict[int, list[int]]:
    """Rows of `load_digits` of each digit in a split."""
    glyphs, indices = load_digits(), {digit: [] for digit in range(10)}
    for index, (image, digit) in enumerate(zip(glyphs.images, glyphs.target)):
        if split_of_glyph(image) == split:
            indices[int(digit)].append(index)
    return indices
