"""The provenance table: where each prototype comes from, what was measured, what the model said."""

from __future__ import annotations

import csv
import io
from typing import Any

from .recipe import Recipe
from .selection import Probe, Selection, divergence


PROVENANCE_NAME = "provenance.csv"
COLUMNS = (
    "prototype",
    "image",
    "position",
    "p1",
    "local_divergence",
    "global_divergence",
    "divergence",
    "cluster",
    "unique_images",
    "word_1",
    "word_2",
    "word_3",
)
GRID_COLUMNS = ("rows", "columns")


def provenance_table(probes: list[Probe], selection: Selection, recipe: Recipe) -> str:
    """One row a prototype, as CSV. Where images have grids of their own, it says their rows and columns.

    Args:
        probes (`list[Probe]`): what was measured.
        selection ([`Selection`]): which tokens became prototypes.
        recipe ([`Recipe`]): whose divergence is told.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    kind, grids = recipe.divergence, any(probe.grid is not None for probe in probes)
    table.writerow(COLUMNS + GRID_COLUMNS if grids else COLUMNS)
    for number, (image, row, cluster) in enumerate(zip(selection.image, selection.row, selection.cluster)):
        probe = probes[image]
        measured = (probe.p1, probe.local[kind], probe.globally[kind], divergence(probe, recipe))
        table.writerow(
            [
                number,
                probe.image,
                int(probe.positions[row]),
                *(f"{float(values[row]):.6g}" for values in measured),
                int(cluster),
                int(selection.unique_images[cluster]),
                *probe.words[row],
                *(probe.grid or ()),
            ]
        )
    return text.getvalue()


def read_provenance(text: str) -> list[dict[str, str]]:
    """Rows of a table by column."""
    return list(csv.DictReader(io.StringIO(text)))


def grid_of(row: dict[str, str], model: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of the image that a prototype comes from.

    Args:
        row (`dict[str, str]`): of a provenance table.
        model (`dict[str, Any]`): what the codebook was built with.

    Returns:
        `tuple[int, int]`; None if neither says it, as for a codebook that was converted.
    """
    if row.get("rows"):
        return int(row["rows"]), int(row["columns"])
    return (model["grid"], model["grid"]) if "grid" in model else None
