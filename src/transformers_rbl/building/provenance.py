"""The provenance table: where each prototype comes from, what was measured, what the model said."""

from __future__ import annotations

import csv
import io

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


def provenance_table(probes: list[Probe], selection: Selection, recipe: Recipe) -> str:
    """One row a prototype, as CSV.

    Args:
        probes (`list[Probe]`): what was measured.
        selection ([`Selection`]): which tokens became prototypes.
        recipe ([`Recipe`]): whose divergence is told.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    kind = recipe.divergence
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
            ]
        )
    return text.getvalue()


def read_provenance(text: str) -> list[dict[str, str]]:
    """Rows of a table by column."""
    return list(csv.DictReader(io.StringIO(text)))
