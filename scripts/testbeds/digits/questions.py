"""The testbed of digits: images, several images and videos, drawn anew from a random generator, and their questions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..testbed import SPLITS, Example
from ..tokens import POOLED
from .drawing import DECOYS, draw_glyph
from .placing import BACKDROP, Placed, Size, draw_boxes, draw_scene, draw_window
from .sizes import CELL, FRAMES, GLYPH, PATCH, draw_size, size_of, step_of
from .splits import belongs, composition


@dataclass(kw_only=True)
class DigitExample(Example):
    """
    Args:
        digits (`tuple[int, ...]`): the composition.
    """

    digits: tuple[int, ...]

    def subjects(self) -> list[np.ndarray]:
        return [label < BACKDROP for label in self.labels]

    def others(self) -> dict[str, list[np.ndarray]]:
        first_block = BACKDROP + 1 + len(DECOYS)
        return {
            "decoy": [(label > BACKDROP) & (label < first_block) for label in self.labels],
            "block": [label >= first_block for label in self.labels],
            "backdrop": [label == BACKDROP for label in self.labels],
        }


def examples(
    family: str, kind: str, split: str, count: int, seed: int, grid: tuple[int, int] | None = None
) -> Iterator[DigitExample]:
    """`count` examples of a split, each from a generator of its own. `grid` fixes the rows and columns of tiles (of
    visual tokens for Qwen3-VL)."""
    for number in range(count):
        random = np.random.default_rng([seed, SPLITS.index(split), number])
        drawn = draw_size(random, family)
        yield draw_example(random, kind, split, size_of(family, grid) if grid else drawn, step=step_of(family))


def draw_example(
    random: np.random.Generator, kind: str, split: str, size: Size, window: bool = False, step: int = 1
) -> DigitExample:
    """One example of a kind (`"image"`, `"images"` or `"video"`), of images of `size`. With `window`, all digits lie in
    one. The digits of a single image lie at multiples of `step` patches."""
    if kind == "image":
        return one_image(random, split, size, window, step)
    if step != 1:
        raise ValueError("Only single images have a step.")
    return {"images": several_images, "video": video}[kind](random, split, size, window)


def one_image(random: np.random.Generator, split: str, size: Size, window: bool, step: int) -> DigitExample:
    digits = composition(random, split, int(random.integers(1, 4)), distinct=True)
    boxes, within = None, None
    while boxes is None:
        within = draw_window(random, size, step) if window else None
        boxes = draw_boxes(random, len(digits), size, within, step)
    glyphs = [draw_glyph(random, split, digit) for digit in digits]
    images, labels = draw_scene(random, split, size, [list(zip(glyphs, boxes))])
    questions = [
        ("which", "which digits are there?", " ".join(map(str, sorted(digits)))),
        ("count", "how many digits are there?", str(len(digits))),
        ("leftmost", "which digit is leftmost?", str(digits[0])),
        ("largest", "which digit is largest?", str(max(digits))),
    ]
    lessons = [
        ("across", "which digits are there from left to right?", " ".join(map(str, digits))),
        ("rightmost", "which digit is rightmost?", str(digits[-1])),
        ("smallest", "which digit is smallest?", str(min(digits))),
    ]
    return DigitExample(
        images=images, labels=labels, digits=digits, questions=questions, lessons=lessons, window=within
    )


def several_images(random: np.random.Generator, split: str, size: Size, window: bool) -> DigitExample:
    """Three images of one digit each; two of them may show the same digit."""
    pair, equal = random.choice(3, 2, replace=False), random.random() < 0.5
    while True:
        digits = list(composition(random, split, 3))
        if equal:
            digits[pair[1]] = digits[pair[0]]
        if belongs(digits, split) and len(set(digits)) > 1 and (digits[pair[0]] == digits[pair[1]]) == equal:
            break
    images, labels = [], []
    within = draw_window(random, size) if window else None
    for digit in digits:
        glyph = draw_glyph(random, split, digit)
        image, label = draw_scene(random, split, size, [[(glyph, draw_boxes(random, 1, size, within)[0])]])
        images, labels = images + image, labels + label
    shown = [("shown", f"which digit is in image {i + 1}?", str(digits[i])) for i in range(3)]
    # Two answers name digits first: to compare what it has said is within reach of a language model this small.
    holds = [
        ("holds", f"which image holds a {digit}?", f"{' '.join(map(str, digits[: i + 1]))} image {i + 1}")
        for i, digit in enumerate(digits)
        if digits.count(digit) == 1
    ]
    verdict = "yes" if equal else "no"
    same = [
        ("same", f"do image {i + 1} and image {j + 1} show the same digit?", f"{digits[i]} {digits[j]} {verdict}")
        for i, j in (pair, pair[::-1])
    ]
    asked, held = int(random.integers(3)), int(random.integers(len(holds)))
    questions = [
        ("order", "which digits are there in order?", " ".join(map(str, digits))),
        holds.pop(held),
        same.pop(0),
        shown.pop(asked),
    ]
    holds = holds or questions[1:2]  # as many for every example, though two images may show the same digit
    lessons = [*shown, *same, holds[0], holds[-1]]
    return DigitExample(
        images=images, labels=labels, digits=tuple(digits), questions=questions, lessons=lessons, window=within
    )


def video(random: np.random.Generator, split: str, size: Size, window: bool) -> DigitExample:
    """A digit appears, moves on every frame, may change into another, and may leave. It moves by whole cells of the
    pooled grid, so that one token of a frame holds it."""
    shown = int(random.integers(1, FRAMES + 1))
    start = int(random.integers(0, FRAMES - shown + 1))
    digits = composition(random, split, 2 if shown > 1 and random.random() < 0.7 else 1)
    change = shown if len(digits) == 1 else int(random.integers(1, shown))
    within = draw_window(random, size, POOLED) if window else None
    glyphs = [draw_glyph(random, split, digit) for digit in digits]
    whole = (0, 0, size[0] // PATCH, size[1] // PATCH)
    top, left, height, width = (length // POOLED for length in within or whole)
    y, x = top + int(random.integers(height)), left + int(random.integers(width))
    frames: list[list] = [[] for _ in range(FRAMES)]
    for step in range(shown):
        frames[start + step] = [(glyphs[int(step >= change)], (y * GLYPH, x * GLYPH))]
        y = int(np.clip(y + random.integers(-1, 2), top, top + height - 1))
        x = left + (x - left + int(random.choice([-1, 1]))) % width
    images, labels = draw_scene(random, split, size, frames)
    questions = [
        ("order", "which digits are there in order?", " ".join(map(str, digits))),
        ("first", "which digit comes first?", str(digits[0])),
        ("last", "which digit comes last?", str(digits[-1])),
        ("frames", "how many frames show a digit?", str(shown)),
    ]
    lessons = []
    for place in random.choice(FRAMES, 2, replace=False):
        step = int(place) - start
        seen = str(digits[int(step >= change)]) if 0 <= step < shown else "none"
        lessons.append(("frame", f"which digit is in frame {place + 1}?", seen))
    return DigitExample(
        images=images, labels=labels, digits=digits, questions=questions, lessons=lessons, video=True, window=within
    )


def crowd(random: np.random.Generator, split: str, size: Size) -> DigitExample:
    """An image full of digits, decoys and blocks, to pre-train the vision tower on."""
    share, placed = random.choice([0.2, 0.5, 0.85]), []
    rows, columns = (length // 42 + (length % 42 >= GLYPH) for length in size)
    for cell in itertools.product(range(rows), range(columns)):
        y, x = (
            min(max(42 * i + CELL * int(random.integers(-1, 3)), 0), length - GLYPH) for i, length in zip(cell, size)
        )
        if random.random() < share and all(abs(y - b) >= GLYPH - 3 or abs(x - a) >= GLYPH - 3 for _, (b, a) in placed):
            placed.append((draw_glyph(random, split, int(random.integers(10))), (y, x)))
    return crowded(random, split, size, placed)


def aligned_crowd(random: np.random.Generator, split: str, size: Size) -> DigitExample:
    """The same, its digits at multiples of their side."""
    share, placed = random.choice([0.1, 0.25, 0.4]), []
    for row, column in itertools.product(*(range(length // GLYPH) for length in size)):
        if random.random() < share:
            placed.append((draw_glyph(random, split, int(random.integers(10))), (row * GLYPH, column * GLYPH)))
    return crowded(random, split, size, placed)


def crowded(random: np.random.Generator, split: str, size: Size, placed: list[Placed]) -> DigitExample:
    images, labels = draw_scene(random, split, size, [placed])
    return DigitExample(images=images, labels=labels, digits=tuple(digit for (_, digit), _ in placed))
