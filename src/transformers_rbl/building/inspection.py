"""What is in a codebook: figures, provenance, and the image patches that its prototypes come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image, ImageOps

from ..models.codebook import RedundancyCodebook
from ..models.names import why_no_hub
from ..wording import describe_pruning
from .images import ImageSource
from .provenance import PROVENANCE_NAME, grid_of, read_provenance


def describe_codebook(book: RedundancyCodebook) -> dict[str, str]:
    """Figures of a codebook, by name."""
    unit, count = book.unit_prototypes, len(book.prototypes)
    norms = book.prototypes.norm(dim=-1)
    figures = {
        "prototypes": f"{count} x {book.prototypes.shape[1]}",
        "repeated rows": str(count - len(book.without_duplicates().prototypes)),
        "norms": f"{norms.min():.4g} to {norms.max():.4g}, median {norms.median():.4g}",
    }
    if count > 1:
        cosines = unit @ unit.T
        mean = (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))
        figures["mean cosine of two"] = f"{mean:.4f}"
        figures["mean cosine with the nearest other"] = f"{cosines.fill_diagonal_(-1).amax(1).mean():.4f}"
    figures["base model"] = book.base_model or "not recorded"
    recommended = book.recommended_pruning
    figures["recommended"] = "nothing" if recommended is None else describe_pruning(recommended)
    for name, value in book.built_with.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {_short(v)}" for k, v in value.items())
        figures[f"built with: {name}"] = _short(value, 400)
    return figures


def provenance_of(codebook: str | os.PathLike[str]) -> list[dict[str, str]] | None:
    """Rows of a codebook's provenance table, None if it has none.

    Args:
        codebook (`str` or `os.PathLike`): a folder or a Hub id.
    """
    if os.path.isdir(codebook):
        path = Path(codebook, PROVENANCE_NAME)
        return read_provenance(path.read_text(encoding="utf-8")) if path.is_file() else None
    # Most codebooks have none, and without a network the Hub's client would look for it for half a minute.
    if not isinstance(try_to_load_from_cache(str(codebook), PROVENANCE_NAME), str) and why_no_hub(str(codebook)):
        return None
    try:
        path = hf_hub_download(str(codebook), PROVENANCE_NAME)
    except EntryNotFoundError:
        return None
    return read_provenance(Path(path).read_text(encoding="utf-8"))


def contact_sheet(
    book: RedundancyCodebook, provenance: list[dict[str, str]], images: ImageSource, path: Path, most: int = 96
) -> tuple[int, int]:
    """Write a picture of the patches that prototypes come from, evenly chosen from the table, by cluster.

    A token is drawn as its cell of the base image's grid, with half a cell around it.

    Args:
        book ([`RedundancyCodebook`]): built here: it says how large the grid was.
        provenance (`list[dict[str, str]]`): rows of its table, see [`provenance_of`].
        images ([`ImageSource`]): those it was built from.
        path (`Path`): the picture to write.
        most (`int`, defaults to 96): patches at most.

    Returns:
        `tuple[int, int]`: patches shown, and source images that `images` does not have or cannot open.

    Raises:
        ValueError: if the codebook does not know its grid, or none of its images is among these.
    """
    from matplotlib.figure import Figure

    ordered = sorted(provenance, key=lambda row: (int(row["cluster"]), int(row["prototype"])))
    chosen = [ordered[i] for i in np.linspace(0, len(ordered) - 1, min(most, len(ordered))).astype(int)]
    wanted = {row["image"] for row in chosen}
    opened: dict[str, Image.Image] = {}
    for _, name, image in images.items(list(range(len(images)))):
        if name in wanted and not isinstance(image, Exception):
            opened[name] = image
    model = book.built_with.get("model", {})
    grids = [grid_of(row, model) for row in chosen]
    if None in grids:
        raise ValueError("The codebook does not say how large its images' token grid was: built elsewhere?")
    shown = [(row, grid, opened[row["image"]]) for row, grid in zip(chosen, grids) if grid and row["image"] in opened]
    if not shown:
        raise ValueError("None of the codebook's source images is among these.")
    columns = min(12, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(1.3 * columns, 1.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, (row, grid, image) in zip(axes, shown):
        axis.imshow(patch(image, int(row["position"]), grid, model.get("crop") == "centre"))
        axis.set_title(f"{row['cluster']}: {row['word_1'][:12]}", fontsize=7, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return len(shown), len(wanted - opened.keys())


def patch(
    image: Image.Image, position: int, grid: int | tuple[int, int], centre: bool, around: float = 0.5
) -> Image.Image:
    """The cell of `image` (of its central square, with `centre`) that token `position` of a grid covers, with `around`
    cells on each side. The grid is rows and columns; a number is both."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    if centre:
        edge = min(image.size)
        image = ImageOps.fit(image, (edge, edge))
    width, height = image.width / columns, image.height / rows
    row, column = divmod(position, columns)
    left, right = round((column - around) * width), round((column + 1 + around) * width)
    upper, lower = round((row - around) * height), round((row + 1 + around) * height)
    return image.crop((left, upper, right, lower))


def _short(value: Any, most: int = 60) -> str:
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"
