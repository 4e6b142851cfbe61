"""Real photos to build a codebook from, without network: crops of the two that ship inside scikit-learn.

python scripts/photo_crops.py outputs/crops
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from sklearn.datasets import load_sample_images


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write them.")],
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 40,
    size: Annotated[int, typer.Option(min=16, max=400, help="Side of a crop, in pixels.")] = 160,
    seed: int = 0,
) -> None:
    """Write square crops of real photos as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    photos, random = load_sample_images().images, np.random.default_rng(seed)
    for number in range(count):
        photo = photos[number % len(photos)]
        top, left = (random.integers(0, edge - size) for edge in photo.shape[:2])
        Image.fromarray(photo[top : top + size, left : left + size]).save(folder / f"crop-{number:04}.png")


if __name__ == "__main__":
    typer.run(main)
