"""The trained testbed's world: handwritten digits among decoys that no question asks about, on photos and textures.

Digits (`load_digits`) and photos (`load_sample_images`) ship inside scikit-learn, so nothing is downloaded. Images,
several images and videos are drawn anew from a random generator; glyphs, photo regions and compositions (which digits,
in which order) belong to one split each, by hash.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny_checkpoint
from transformers_rbl.building.recipe import PROMPT


SPLITS = ("train", "validation", "test")
PATCH, GLYPH, CELL = 14, 28, 7  # pixels: a vision patch, a digit's side, the lattice on which things are placed
POOLED = 2  # a video's tokens are pooled over so many patches a side
DECOYS = ("cross", "plus", "triangle", "star", "arrow", "diamond")
BLOCKS = ("photo", "checks", "stripes")
BACKDROP = 10  # labels of patches: digits 0 to 9, backdrop, then decoys and blocks
LABELS = [*map(str, range(10)), "backdrop", *DECOYS, *BLOCKS]
SALIENT = (0.30, 0.45)  # share of the patches under decoys and blocks
FRAMES = 6


@dataclass
class Example:
    """Images or one video, what is where in them, and questions.

    Args:
        images (`list[np.ndarray]`): `(height, width, 3)` uint8; a video's frames if `video`.
        labels (`list[np.ndarray]`): per image, what each 14-pixel patch shows, an index into `LABELS`.
        digits (`tuple[int, ...]`): the composition.
        questions (`list[tuple[str, str, str]]`): kind, question, answer; what is evaluated.
        lessons (`list[tuple[str, str, str]]`): more of them, for training only.
        video (`bool`): whether the images are frames.
        window (`tuple[int, int, int, int]`, *optional*): top, left, rows and columns, in patches, that hold all digits.
    """

    images: list[np.ndarray]
    labels: list[np.ndarray]
    digits: tuple[int, ...]
    questions: list[tuple[str, str, str]] = field(default_factory=list)
    lessons: list[tuple[str, str, str]] = field(default_factory=list)
    video: bool = False
    window: tuple[int, int, int, int] | None = None

    def pictures(self) -> list[Image.Image]:
        return [Image.fromarray(image) for image in self.images]

    def captions(self) -> list[str]:
        """What the prompt says before each image (before a video as a whole)."""
        return [""] if self.video or len(self.images) == 1 else [f"image {n + 1}:" for n in range(len(self.images))]

    def prompt(self, question: str) -> str:
        """The question after its images, or its video."""
        placeholder = "<video>" if self.video else "<image>"
        return " ".join([*(f"{caption} {placeholder}".strip() for caption in self.captions()), question])


# What each family's testbed shows, and the side of one of its tiles.
KINDS = {
    "llava": ("image",),
    "llava_next": ("image",),
    "llava_onevision": ("images", "video"),
}
TILE = {"llava": 168, "llava_next": 112, "llava_onevision": 112}
# Rows and columns of tiles of a LLaVA-NeXT image: tall ones, so that left and right are the same in a tile and in the
# image. With columns of tiles a language model this small did not learn, in this time, the order of digits
# (docs/results/testbed.md).
GRIDS = ((2, 1), (3, 1))
GRID_SHARES = (0.6, 0.4)


def example(random: np.random.Generator, kind: str, split: str, size: tuple[int, int], window: bool = False) -> Example:
    """One example of a kind (`"image"`, `"images"` or `"video"`), of images of `size` (height, width)."""
    return {"image": _one_image, "images": _several_images, "video": _video}[kind](random, split, size, window)


def examples(
    family: str, kind: str, split: str, count: int, seed: int, grid: tuple[int, int] | None = None
) -> Iterator[Example]:
    """`count` examples of a split, each from a generator of its own. `grid` fixes the tiles of LLaVA-NeXT's images."""
    for number in range(count):
        random = np.random.default_rng([seed, SPLITS.index(split), number])
        drawn = GRIDS[random.choice(len(GRIDS), p=GRID_SHARES)] if family == "llava_next" else (1, 1)
        rows, columns = grid or drawn
        yield example(random, kind, split, (rows * TILE[family], columns * TILE[family]))


def _one_image(random, split, size, window) -> Example:
    digits = composition(random, split, int(random.integers(1, 4)), distinct=True)
    boxes, held = None, None
    while boxes is None:
        held = _window(random, size) if window else None
        boxes = _boxes(random, len(digits), size, held)
    glyphs = [_glyph(random, split, digit) for digit in digits]
    image, labels = _scene(random, split, size, [list(zip(glyphs, boxes))])
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
    return Example(image, labels, digits, questions, lessons, window=held)


def _several_images(random, split, size, window) -> Example:
    """Three images of one digit each; two of them may show the same digit."""
    pair, equal = random.choice(3, 2, replace=False), random.random() < 0.5
    while True:
        digits = list(composition(random, split, 3))
        if equal:
            digits[pair[1]] = digits[pair[0]]
        if belongs(digits, split) and len(set(digits)) > 1 and (digits[pair[0]] == digits[pair[1]]) == equal:
            break
    images, labels = [], []
    window = _window(random, size) if window else None
    for digit in digits:
        glyph = _glyph(random, split, digit)
        image, label = _scene(random, split, size, [[(glyph, _boxes(random, 1, size, window)[0])]])
        images, labels = images + image, labels + label
    shown = [("shown", f"which digit is in image {i + 1}?", str(digits[i])) for i in range(3)]
    # Two answers name digits first: to compare what it has said is within reach of a language model this small.
    holds = [
        ("holds", f"which image holds a {digit}?", f"{' '.join(map(str, digits[: i + 1]))} image {i + 1}")
        for i, digit in enumerate(digits)
        if digits.count(digit) == 1
    ]
    same = [
        (
            "same", f"do image {i + 1} and image {j + 1} show the same digit?",
            f"{digits[i]} {digits[j]} {'yes' if equal else 'no'}",
        )
        for i, j in (pair, pair[::-1])
    ]  # fmt: skip
    asked, held = int(random.integers(3)), int(random.integers(len(holds)))
    questions = [
        ("order", "which digits are there in order?", " ".join(map(str, digits))), holds.pop(held), same.pop(0),
        shown.pop(asked),
    ]  # fmt: skip
    holds = holds or questions[1:2]  # as many for every example, though two images may show the same digit
    lessons = [*shown, *same, holds[0], holds[-1]]
    return Example(images, labels, tuple(digits), questions, lessons, window=window)


def _video(random, split, size, window) -> Example:
    """A digit appears, moves on every frame, may change into another, and may leave. It moves by whole cells of the
    pooled grid, so that one token of a frame holds it."""
    shown = int(random.integers(1, FRAMES + 1))
    start = int(random.integers(0, FRAMES - shown + 1))
    digits = composition(random, split, 2 if shown > 1 and random.random() < 0.7 else 1)
    change = shown if len(digits) == 1 else int(random.integers(1, shown))
    window = _window(random, size, POOLED) if window else None
    glyphs = [_glyph(random, split, digit) for digit in digits]
    whole = (0, 0, size[0] // PATCH, size[1] // PATCH)
    top, left, height, width = (length // POOLED for length in window or whole)
    y, x = top + int(random.integers(height)), left + int(random.integers(width))
    frames: list[list] = [[] for _ in range(FRAMES)]
    for step in range(shown):
        frames[start + step] = [(glyphs[int(step >= change)], (y * GLYPH, x * GLYPH))]
        y = int(np.clip(y + random.integers(-1, 2), top, top + height - 1))
        x = left + (x - left + int(random.choice([-1, 1]))) % width
    images, labels = _scene(random, split, size, frames)
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
    return Example(images, labels, digits, questions, lessons, video=True, window=window)


def crowd(random: np.random.Generator, split: str, side: int) -> Example:
    """A square full of digits, decoys and blocks, to pre-train the vision tower on."""
    cells, share = side // 42 + (side % 42 >= GLYPH), random.choice([0.2, 0.5, 0.85])
    placed = []
    for row, column in itertools.product(range(cells), repeat=2):
        y, x = (min(max(42 * i + CELL * int(random.integers(-1, 3)), 0), side - GLYPH) for i in (row, column))
        if random.random() < share and all(abs(y - b) >= GLYPH - 3 or abs(x - a) >= GLYPH - 3 for _, (b, a) in placed):
            placed.append((_glyph(random, split, int(random.integers(10))), (y, x)))
    image, labels = _scene(random, split, (side, side), [placed])
    return Example(image, labels, tuple(label for (_, label), _ in placed))


def _scene(random, split, size, frames):
    """Frames of one backdrop and one set of decoys, each with its digits: `[((glyph, digit), (y, x)), …]`."""
    image = _backdrop(random, split, size)
    labels = np.full((size[0] // PATCH, size[1] // PATCH), BACKDROP)
    busy = np.zeros((size[0] // CELL, size[1] // CELL), bool)
    side = GLYPH // CELL
    for _, (y, x) in itertools.chain.from_iterable(frames):
        busy[y // CELL : y // CELL + side, x // CELL : x // CELL + side] = True
    _add_decoys(random, split, image, labels, busy)
    images, found = [], []
    colours = {}
    for frame in frames:
        drawn, label = image.copy(), labels.copy()
        for (glyph, digit), (y, x) in frame:
            colour = colours.setdefault(id(glyph), _bright(random))
            _paint(drawn, label, glyph, y, x, colour, digit)
        images.append(np.round(np.clip(drawn, 0, 1) * 255).astype(np.uint8))
        found.append(label)
    return images, found


def _add_decoys(random, split, image, labels, busy) -> None:
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
            variants = _decoy_shapes()[DECOYS[kind]]
            mask = variants[int(random.integers(len(variants)))]
            _paint(image, labels, mask, y, x, _bright(random), BACKDROP + 1 + kind)
        else:
            block = BLOCKS[int(random.integers(len(BLOCKS)))]
            paint = _block(random, split, block, height, width)
            label = BACKDROP + 1 + len(DECOYS) + BLOCKS.index(block)
            _paint(image, labels, np.ones((height, width), np.float32), y, x, paint, label)


def _paint(image, labels, mask, y, x, colour, label) -> None:
    height, width = mask.shape
    part = image[y : y + height, x : x + width]
    part += (colour - part) * mask[..., None]
    for row in range(y // PATCH, (y + height - 1) // PATCH + 1):
        for column in range(x // PATCH, (x + width - 1) // PATCH + 1):
            top, left = max(row * PATCH - y, 0), max(column * PATCH - x, 0)
            ink = mask[top : (row + 1) * PATCH - y, left : (column + 1) * PATCH - x].sum()
            if ink > 0.02 * PATCH**2:
                labels[row, column] = label


def _block(random, split, kind, height, width) -> np.ndarray:
    if kind == "photo":
        return _photo(random, split, height, width)
    y, x = np.mgrid[0:height, 0:width]
    period = int(random.integers(3, 8))
    if kind == "checks":
        on = (y // period + x // period) % 2
    else:
        on = ((np.cos(angle := random.uniform(0, np.pi)) * x + np.sin(angle) * y) // period) % 2
    dark, bright = random.random(3) * 0.3, _bright(random)
    return (dark + (bright - dark) * on[..., None]).astype(np.float32)


def _backdrop(random, split, size) -> np.ndarray:
    height, width = size
    kind = random.choice(["plain", "gradient", "texture", "photo"], p=[1 / 6, 1 / 6, 1 / 6, 1 / 2])
    if kind == "plain":
        image = np.broadcast_to(random.random(3) * 0.5, (height, width, 3))
    elif kind == "gradient":
        y, x = np.mgrid[0:height, 0:width] / max(height, width)
        angle = random.uniform(0, 2 * np.pi)
        slope = np.cos(angle) * x + np.sin(angle) * y
        slope = (slope - slope.min()) / (slope.max() - slope.min())
        start, end = random.random(3) * 0.55, random.random(3) * 0.55
        image = start + (end - start) * slope[..., None]
    elif kind == "texture":
        side = int(random.choice([4, 8, 16]))
        image = (
            _resize(random.random((side, side, 3), dtype=np.float32), height, width) * 0.25 + random.random(3) * 0.35
        )
    else:
        image = _photo(random, split, height, width) * 0.55
    return (image + random.standard_normal((height, width, 1)) * 0.02).astype(np.float32)


def _photo(random, split, height, width) -> np.ndarray:
    """A crop of a photo, of the columns that belong to the split."""
    photo = _photos()[int(random.integers(2))]
    start, end = (int(share * photo.shape[1]) for share in photo_columns(split))
    side = int(random.integers(48, min(photo.shape[0], end - start) + 1))
    tall, wide = (max(8, round(side * length / max(height, width))) for length in (height, width))
    y, x = int(random.integers(photo.shape[0] - tall + 1)), int(random.integers(start, end - wide + 1))
    crop = photo[y : y + tall, x : x + wide]
    return _resize(crop[:, ::-1] if random.random() < 0.5 else crop, height, width)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])).resize((width, height), Image.Resampling.BILINEAR)
                for c in range(3)]  # fmt: skip
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def _bright(random) -> np.ndarray:
    return (0.75 + 0.25 * random.random(3)).astype(np.float32)


def _window(random, size, step: int = 1) -> tuple[int, int, int, int]:
    """Top, left, rows and columns in patches, multiples of `step`: the whole image now and then, more often few rows
    and columns, a digit's at least."""
    rows, columns = (length // PATCH // step for length in size)
    if random.random() < 0.2:
        return 0, 0, rows * step, columns * step
    height, width = (int(random.integers(2 // step, most + 1, 2).min()) for most in (rows, columns))
    top, left = int(random.integers(rows - height + 1)), int(random.integers(columns - width + 1))
    return top * step, left * step, height * step, width * step


def _boxes(random, count, size, window) -> list[tuple[int, int]] | None:
    """Places `(y, x)` of digits from left to right, each of four whole patches; none across two tiles. None if chance
    found no such places: a window may have none."""
    top, left, height, width = window or (0, 0, size[0] // PATCH, size[1] // PATCH)
    side, tile = GLYPH // PATCH, size[1]
    for _ in range(400):
        ys = PATCH * (top + random.integers(0, height - side + 1, count))
        xs = PATCH * np.sort(left + random.integers(0, width - side + 1, count))
        apart = all(
            abs(ys[i] - ys[j]) >= GLYPH or abs(xs[i] - xs[j]) >= GLYPH
            for i, j in itertools.combinations(range(count), 2)
        )
        if apart and (np.diff(xs) > 0).all() and (ys // tile == (ys + GLYPH - 1) // tile).all():
            return [(int(y), int(x)) for y, x in zip(ys, xs)]
    return None


# --- splits -----------------------------------------------------------------------------------------------------------


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
    return len(digits) == 1 or _split(repr(tuple(digits)).encode(), 80, 88) == split


def split_of_glyph(image: np.ndarray) -> str:
    """Which split a digit's 8 x 8 picture belongs to: 70% train, 10% validation, 20% test; equal pictures to one."""
    return _split(image.astype(np.uint8).tobytes(), 70, 80)


def photo_columns(split: str) -> tuple[float, float]:
    """From where to where a photo belongs to the split, in shares of its width."""
    return {"train": (0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1)}[split]


def _split(content: bytes, train: int, validation: int) -> str:
    place = int(hashlib.sha256(content).hexdigest(), 16) % 100
    return SPLITS[(place >= train) + (place >= validation)]


@functools.cache
def glyph_indices(split: str) -> dict[int, list[int]]:
    """Rows of `load_digits` of each digit in a split."""
    data, found = load_digits(), {digit: [] for digit in range(10)}
    for index, (image, digit) in enumerate(zip(data.images, data.target)):
        if split_of_glyph(image) == split:
            found[int(digit)].append(index)
    return found


@functools.cache
def _glyphs() -> np.ndarray:
    images = torch.from_numpy(load_digits().images / 16).float()[:, None]
    images = torch.nn.functional.pad(images, (1, 1, 0, 0))
    images = torch.nn.functional.interpolate(images, (GLYPH, GLYPH), mode="bicubic", align_corners=False)
    return images.clamp(0, 1)[:, 0].numpy()


def _glyph(random, split: str, digit: int) -> tuple[np.ndarray, int]:
    return _glyphs()[random.choice(glyph_indices(split)[digit])], digit


@functools.cache
def _photos() -> list[np.ndarray]:
    return [photo.astype(np.float32) / 255 for photo in load_sample_images().images]


@functools.cache
def _decoy_shapes() -> dict[str, list[np.ndarray]]:
    """Line drawings of the size and stroke of a digit, each turned and scaled a little in 24 ways."""
    angles = np.linspace(0, 2 * np.pi, 5, endpoint=False) - np.pi / 2
    outer = [(np.cos(a), np.sin(a)) for a in angles]
    star = [outer[i] for i in (0, 2, 4, 1, 3, 0)]
    strokes = {
        "cross": [[(-0.7, -0.7), (0.7, 0.7)], [(-0.7, 0.7), (0.7, -0.7)]],
        "plus": [[(-0.9, 0), (0.9, 0)], [(0, -0.9), (0, 0.9)]],
        "triangle": [[(0, -0.9), (0.85, 0.7), (-0.85, 0.7), (0, -0.9)]],
        "star": [star],
        "arrow": [[(-0.9, 0), (0.9, 0)], [(0.2, -0.6), (0.9, 0), (0.2, 0.6)]],
        "diamond": [[(0, -0.9), (0.9, 0), (0, 0.9), (-0.9, 0), (0, -0.9)]],
    }
    random, scale, shapes = np.random.default_rng(0), 4, {}
    for name, lines in strokes.items():
        shapes[name] = []
        for _ in range(24):
            turn, size = random.uniform(-0.25, 0.25), random.uniform(0.75, 1) * GLYPH * scale / 2
            rotate = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            picture = Image.new("L", (GLYPH * scale, GLYPH * scale))
            draw = ImageDraw.Draw(picture)
            for line in lines:
                points = (np.array(line) @ rotate.T) * size * 0.95 + GLYPH * scale / 2
                draw.line([tuple(point) for point in points], fill=255, width=4 * scale, joint="curve")
            small = picture.resize((GLYPH, GLYPH), Image.Resampling.BOX)
            shapes[name].append(np.asarray(small, np.float32) / 255)
    return shapes


# --- words and models -------------------------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """Every token of the testbed's language: words of its questions and answers, and of the probing question."""
    words = set("user assistant system : ? . , yes no image images video none one a photo word frame".split())
    words |= {str(digit) for digit in range(10)}
    random = np.random.default_rng(0)
    for kind in ("image", "images", "video"):
        drawn = example(random, kind, "train", (168, 168))
        for _, question, answer in drawn.questions + drawn.lessons:
            words |= set(_split_words(question)) | set(_split_words(answer))
    words |= set(_split_words(PROMPT))
    return [*tiny_checkpoint.SPECIALS, "<unk>", *sorted(words)]


def _split_words(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.lower())]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, in lower case; words that it does not know become `<unk>`."""
    words = {word: index for index, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", additional_special_tokens=tiny_checkpoint.SPECIALS[3:], model_max_length=8192,
    )  # fmt: skip


def config(family: str):
    """The stock config: a vision tower of 96 dimensions and a language model of 128."""
    cfg = tiny_checkpoint.config(
        family, image_size=TILE[family], patch_size=PATCH, vision_width=96, vision_layers=4, width=128, layers=3
    )
    cfg.text_config.vocab_size, cfg.text_config.initializer_range = len(vocabulary()), 0.02
    cfg.text_config.intermediate_size, cfg.text_config.num_key_value_heads = 320, 4
    cfg.vision_config.intermediate_size, cfg.vision_config.hidden_act = 384, "gelu"
    if family != "llava_onevision":
        cfg.vision_config.initializer_factor = 1.0
    if family == "llava_next":
        side = TILE[family]
        grids = sorted({*GRIDS, (1, 1), (1, 2), (2, 2)})
        cfg.image_grid_pinpoints = [[rows * side, columns * side] for rows, columns in grids]
    return cfg


# --- files ------------------------------------------------------------------------------------------------------------

Family = Annotated[str, typer.Option(help=f"One of {', '.join(KINDS)}.")]


def write_images(
    folder: Annotated[Path, typer.Argument()],
    family: Family = "llava_next",
    count: Annotated[int, typer.Option(min=1)] = 64,
    split: Annotated[str, typer.Option(help=", ".join(SPLITS))] = "train",
    seed: Annotated[int, typer.Option(min=0)] = 1,
) -> None:
    """Unlabelled images, to build a codebook or to calibrate with. Of LLaVA-NeXT every second one is of a single tile's
    size, since a codebook is built from base images: these show tokens at the scale of tiles."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, lines = KINDS[family][0], []
    for number in range(count):
        grid = (1, 1) if number % 2 else None
        drawn = next(examples(family, kind, split, 1, seed * 100_003 + number, grid))
        name = f"{number:05}.png"
        drawn.pictures()[number % len(drawn.images)].save(folder / name)
        if len(drawn.images) == 1:
            lines += [{"image": name, "question": text, "answer": said} for _, text, said in drawn.questions]
    if lines:  # which building does not read
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def write_questions(
    folder: Annotated[Path, typer.Argument()],
    family: Family = "llava_next",
    count: Annotated[int, typer.Option(min=1, help="Examples, of four questions each.")] = 50,
    split: Annotated[str, typer.Option(help=", ".join(SPLITS))] = "test",
    seed: Annotated[int, typer.Option(min=0)] = 100,
    task: Annotated[str | None, typer.Option(help="Make the folder an lmms-eval task of this name, too.")] = None,
) -> None:
    """`questions.jsonl` with its images, as `rbl evaluate` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, drawn in enumerate(examples(family, KINDS[family][0], split, count, seed)):
        names = [f"{number:05}-{place}.png" for place in range(len(drawn.images))]
        for name, picture in zip(names, drawn.pictures()):
            picture.save(folder / name)
        for kind, question, reply in drawn.questions:
            row = {"image": names, "question": drawn.prompt(question), "answer": reply, "kind": kind}
            lines.append(json.dumps(row))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    if task is not None:
        (folder / f"{task}.yaml").write_text(TASK.format(task=task, questions=(folder / "questions.jsonl").resolve()))
        (folder / "utils.py").write_text(TASK_FUNCTIONS)


TASK = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{questions}"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: question
doc_to_target: answer
process_results: !function utils.score
generation_kwargs: {{max_new_tokens: 16, do_sample: false}}
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 1.0}}]
"""
TASK_FUNCTIONS = """from pathlib import Path

from PIL import Image


def images(doc):
    return [Image.open(Path(__file__).with_name(name)).convert("RGB") for name in doc["image"]]


def score(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""
