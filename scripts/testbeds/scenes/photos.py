"""What is behind the things and beside them: photos that ship inside scikit-learn and scikit-image, walls, clutter."""

from __future__ import annotations

import colorsys
import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

from .concepts import PHOTOS, PIECES, WALLS
from .splits import photo_columns


FILES = {"immunohistochemistry": "ihc"}  # in scikit-image's folder, where it has another name
TINTS = {"grass": (0.55, 1.1, 0.4), "brick": (1.15, 0.7, 0.5), "gravel": (1.0, 0.98, 0.92), "moon": (0.95, 1.0, 1.05)}
SHAPES = ("cross", "arrow", "ring", "lines", "squares")


@functools.cache
def photo(name: str) -> np.ndarray:
    """`(height, width, 3)` uint8."""
    bundled = load_sample_images()
    for path, image in zip(bundled.filenames, bundled.images):
        if Path(path).stem == name:
            return image
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise RuntimeError("The scenes testbed takes photos from scikit-image: pip install scikit-image.")
    path = next((Path(package.origin).parent / "data").glob(f"{FILES.get(name, name)}.*"))
    image = Image.open(path).convert("RGB")
    image.thumbnail((700, 700))
    return np.asarray(image)


def crop_photo(random: np.random.Generator, split: str, name: str, height: int, width: int) -> np.ndarray:
    """`(height, width, 3)` float32: a crop of the columns that belong to the split; grey photos are tinted."""
    whole = photo(name)
    start, end = (int(share * whole.shape[1]) for share in photo_columns(split))
    longest = min(whole.shape[0], end - start)
    side = int(random.integers(min(64, longest), longest + 1))
    tall, wide = (max(8, round(side * length / max(height, width))) for length in (height, width))
    y, x = int(random.integers(whole.shape[0] - tall + 1)), int(random.integers(start, end - wide + 1))
    crop = whole[y : y + tall, x : x + wide]
    if random.random() < 0.5:
        crop = crop[:, ::-1]
    resized = Image.fromarray(np.ascontiguousarray(crop)).resize((width, height), Image.Resampling.BILINEAR)
    tint = np.array(TINTS.get(name, (1, 1, 1))) * random.uniform(0.9, 1.1, 3)
    return (np.asarray(resized) * tint.astype(np.float32)).astype(np.float32)


def draw_background(random: np.random.Generator, split: str, side: int) -> tuple[np.ndarray, str]:
    """`(side, side, 3)` float32 of 0 to 255, and its word: 3 of 5 are photos, the others walls."""
    if random.random() < 0.6:
        name = list(PHOTOS)[int(random.integers(len(PHOTOS)))]
        image, word = crop_photo(random, split, name, side, side) * random.uniform(0.65, 1.0), PHOTOS[name]
    else:
        word = list(WALLS)[int(random.integers(len(WALLS)))]
        hue, saturation, value = (random.uniform(*span) for span in WALLS[word])
        colour = 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))
        y, x = np.mgrid[0:side, 0:side] / side - 0.5
        light = 1 + random.uniform(-0.25, 0.25) * x + random.uniform(-0.25, 0.25) * y
        image = colour * light[..., None]
    return (image + random.standard_normal((side, side, 1), dtype=np.float32) * 4).astype(np.float32), word


def draw_clutter(random: np.random.Generator, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Something that no question asks about: `(height, width, 3)` float32 and its `(height, width)` mask."""
    height, width = (int(side) for side in random.integers(22, 48, 2))
    if random.random() < 0.4:
        piece = crop_photo(random, split, PIECES[int(random.integers(len(PIECES)))], height, width)
        return piece, np.ones((height, width), np.float32)
    shape = SHAPES[int(random.integers(len(SHAPES)))]
    dark, bright = random.random(3) * 120, 130 + random.random(3) * 125
    if shape in ("lines", "squares"):
        y, x = np.mgrid[0:height, 0:width]
        period, angle = int(random.integers(3, 9)), random.uniform(0, np.pi)
        across = (np.cos(angle) * x + np.sin(angle) * y) // period
        on = (y // period + x // period) % 2 if shape == "squares" else across % 2
        return (dark + (bright - dark) * on[..., None]).astype(np.float32), np.ones((height, width), np.float32)
    side = max(height, width)
    colour = bright if random.random() < 0.7 else dark
    return np.broadcast_to(colour, (side, side, 3)).astype(np.float32), sign(shape, side, random.uniform(0, 2 * np.pi))


def sign(shape: str, side: int, turn: float) -> np.ndarray:
    """`(side, side)` float32: a cross, an arrow or a ring, turned."""
    scale = 3 * side
    image = Image.new("L", (scale, scale))
    draw, centre, radius, width = ImageDraw.Draw(image), scale / 2, scale * 0.44, max(6, scale // 9)

    def at(angle: float, share: float = 1) -> tuple[float, float]:
        return centre + radius * share * np.cos(angle + turn), centre + radius * share * np.sin(angle + turn)

    if shape == "cross":
        for angle in (0, np.pi / 2):
            draw.line([at(angle), at(angle + np.pi)], fill=255, width=width)
    elif shape == "arrow":
        draw.line([at(0), at(np.pi)], fill=255, width=width)
        draw.line([at(0.9, 0.75), at(0), at(-0.9, 0.75)], fill=255, width=width, joint="curve")
    else:
        draw.ellipse([centre - radius, centre - radius, centre + radius, centre + radius], outline=255, width=width)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX), np.float32) / 255
