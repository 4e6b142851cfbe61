"""`rbl convert`: upstream's codebooks as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .output import claim
from .shared import Overwrite, RecommendedRatio, RecommendedThreshold, app, check_setting, one_sentence


@app.command()
@one_sentence
def convert(
    source: Annotated[Path, typer.Argument(help="Upstream's .pt codebook.")],
    out: Annotated[Path, typer.Argument(help="Folder to write codebook.safetensors and codebook.json to.")],
    image_ids: Annotated[Path | None, typer.Option(help="JSON list: the image each prototype comes from.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model it belongs to.")] = None,
    keep_ratio: RecommendedRatio = None,
    threshold: RecommendedThreshold = None,
    drop_duplicates: Annotated[bool, typer.Option(help="Leave repeated rows out: cosine scores stay.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn an upstream .pt codebook into an artifact that from_pretrained reads."""
    from ..building.upstream import convert_upstream
    from ..hub.cards import save_with_card

    check_setting(keep_ratio, threshold)
    claim(out, ("codebook.json", "codebook.safetensors"), overwrite)
    book = convert_upstream(source, image_ids, base_model, keep_ratio, threshold)
    repeated = book.built_with["source"]["repeated_rows"]
    if drop_duplicates:
        book = book.without_duplicates()
    has_card = save_with_card(book, out)
    table = Table(title=str(out), show_header=False)
    table.add_row("source", f"{source.name}, sha256 {book.built_with['source']['sha256'][:12]}…")
    table.add_row("prototypes", " x ".join(map(str, book.prototypes.shape)))
    table.add_row("repeated rows", f"{repeated}, {'left out' if drop_duplicates else 'kept'}")
    table.add_row("base model", base_model or "not given")
    table.add_row("card", "README.md" if has_card else "README.md was there, and stays as it was")
    Console().print(table)
