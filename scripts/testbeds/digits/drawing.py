"""Pictures of single things: digits, decoys, blocks and backdrops, from what ships inside scikit-learn."""

from __future__ import annotations

import functools

import numpy as np
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images

from .sizes import GLYPH
from .splits import glyph_indices, photo_columns


DECOYS = ("cross", "plus", "triangle", "star", "arrow", "diamond")
BLOCKS = ("photo", "checks", "stripes")


def draw_backdrop(random: np.random.Generator, split: str, size: tuple[int, int]) -> np.ndarray:
    """`(height, width, 3)` float32, dark: plain, a gradient, a soft texture or, half of the time, a photo."""
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
        texture = resize(random.random((side, side, 3), dtype=np.float32), height, width)
        image = texture * 0.25 + random.random(3) * 0.35
    else:
        image = crop_photo(random, split, height, width) * 0.55
    return (image + random.standard_normal((height, width, 1)) * 0.02).astype(np.float32)


def draw_block(random: np.random.Generator, split: str, kind: str, height: int, width: int) -> np.ndarray:
    """`(height, width, 3)` float32: one of `BLOCKS`."""
    if kind == "photo":
        return crop_photo(random, split, height, width)
    y, x = np.mgrid[0:height, 0:width]
    period = int(random.integers(3, 8))
    if kind == "checks":
        on = (y // period + x // period) % 2
    else:
        angle = random.uniform(0, np.pi)
        on = ((np.cos(angle) * x + np.sin(angle) * y) // period) % 2
    dark, bright = random.random(3) * 0.3, bright_colour(random)
    return (dark + (bright - dark) * on[..., None]).astype(np.float32)


def crop_photo(random: np.random.Generator, split: str, height: int, width: int) -> np.ndarray:
    """A crop of a photo, of the columns that belong to the split."""
    photo = all_photos()[int(random.integers(2))]
    start, end = (int(share * photo.shape[1]) for share in photo_columns(split))
    side = int(random.integers(48, min(photo.shape[0], end - start) + 1))
    tall, wide = (max(8, round(side * length / max(height, width))) for length in (height, width))
    y, x = int(random.integers(photo.shape[0] - tall + 1)), int(random.integers(start, end - wide + 1))
    crop = photo[y : y + tall, x : x + wide]
    return resize(crop[:, ::-1] if random.random() < 0.5 else crop, height, width)


@functools.cache
def all_photos() -> list[np.ndarray]:
    return [photo.astype(np.float32) / 255 for photo in load_sample_images().images]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(image, -1, 0)]
    scaled = [channel.resize((width, height), Image.Resampling.BILINEAR) for channel in channels]
    return np.stack([np.asarray(channel) for channel in scaled], axis=-1)


def bright_colour(random: np.random.Generator) -> np.ndarray:
    return (0.75 + 0.25 * random.random(3)).astype(np.float32)


def draw_glyph(random: np.random.Generator, split: str, digit: int) -> tuple[np.ndarray, int]:
    """How someone wrote the digit, `(GLYPH, GLYPH)` in [0, 1], and which it is."""
    return all_glyphs()[random.choice(glyph_indices(split)[digit])], digit


@functools.cache
def all_glyphs() -> np.ndarray:
    images = torch.from_numpy(load_digits().images / 16).float()[:, None]
    images = torch.nn.functional.pad(images, (1, 1, 0, 0))
    images = torch.nn.functional.interpolate(images, (GLYPH, GLYPH), mode="bicubic", align_corners=False)
    return images.clamp(0, 1)[:, 0].numpy()


@functools.cache
def decoy_shapes() -> dict[str, list[np.ndarray]]:
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
