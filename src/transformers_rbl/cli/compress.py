"""`rbl compress`: a codebook with fewer prototypes, and how far that can change a score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .output import claim
from .shared import Overwrite, app, one_sentence


@app.command()
@one_sentence
def compress(
    codebook: Annotated[str, typer.Argument(help="Folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write codebook.safetensors and codebook.json to.")],
    max_change: Annotated[float | None, typer.Option(help="No cosine score falls by more, and none rises.")] = None,
    count: Annotated[int | None, typer.Option(help="How many prototypes stay; instead of --max-change.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Keep the prototypes near which all others lie: scores cost less, and change by a bound that is told."""
    from ..building.compressing import compress as keep_centres
    from ..hub.cards import save_with_card
    from ..models.codebook import RedundancyCodebook

    claim(out, ("codebook.json", "codebook.safetensors"), overwrite)
    book = RedundancyCodebook.from_pretrained(codebook)
    smaller = keep_centres(book, max_change, count)
    save_with_card(smaller.codebook, out)
    table = Table(title=str(out), show_header=False)
    table.add_row("prototypes", f"{len(smaller.rows)} of {len(book.prototypes)}")
    table.add_row("a cosine score falls by at most", f"{smaller.bound:.4f}")
    Console().print(table)
