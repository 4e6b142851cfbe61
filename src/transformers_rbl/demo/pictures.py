"""An answer's image with dropped patches dimmed, and single patches of it."""

from __future__ import annotations

from PIL import Image

from ..evaluation.plots import dim_dropped
from .asking import Answer


VIEWS = {"base": "base image", "tiles": "tiles"}
SHOWN = 960  # pixels: longer side of a displayed picture


def picture(answer: Answer, view: str) -> Image.Image:
    """The image as the page shows it, dropped patches dimmed.

    Args:
        answer ([`Answer`]): whose image.
        view (`str`): `"base"` or `"tiles"`.
    """
    width, height = answer.image.size
    scale = SHOWN / max(width, height)  # small ones grow: the page then never has to, and clicks fall where they should
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return dim_dropped(answer.image.resize(size), answer.keep_mask[answer.grids[view]].numpy())


def cell_at(shape: tuple[int, int], x: float, y: float, size: tuple[int, int]) -> tuple[int, int]:
    """Row and column of a grid under a pixel of a picture.

    Args:
        shape (`tuple[int, int]`): rows and columns of the grid, which covers the picture.
        x, y (`float`): the pixel, from the upper left corner; outside the picture the nearest cell counts.
        size (`tuple[int, int]`): width and height of the picture.
    """
    (rows, columns), (width, height) = shape, size
    return min(max(int(y * rows / height), 0), rows - 1), min(max(int(x * columns / width), 0), columns - 1)


def cell_box(
    size: tuple[int, int], shape: tuple[int, int], row: int, column: int, around: float = 0.0
) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a grid's cell in a picture.

    Args:
        size (`tuple[int, int]`): width and height of the picture.
        shape (`tuple[int, int]`): rows and columns of the grid, which covers it.
        row, column (`int`): the cell.
        around (`float`): so many cells besides on each side.
    """
    width, height = size[0] / shape[1], size[1] / shape[0]
    left, top = round((column - around) * width), round((row - around) * height)
    right, bottom = round((column + 1 + around) * width), round((row + 1 + around) * height)
    return left, top, max(right, left + 1), max(bottom, top + 1)  # never empty, however thin the picture


def cut(image: Image.Image, shape: tuple[int, int], row: int, column: int) -> Image.Image:
    """A cell of a grid of that shape over an image, and half a cell around it, large enough to see."""
    return enlarged(image.crop(cell_box(image.size, shape, row, column, around=0.5)))


def enlarged(image: Image.Image, side: int = 240) -> Image.Image:
    """An image with a longer side of so many pixels."""
    scale = side / max(*image.size, 1)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
