"""`rbl inspect`: what is in a codebook."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .output import claim_file
from .shared import ImageColumn, Overwrite, Split, app, need_matplotlib, one_sentence


PROVENANCE_COLUMNS = ("prototype", "image", "position", "p1", "divergence", "cluster", "unique_images", "word_1")


@app.command()
@one_sentence
def inspect(
    codebook: Annotated[str, typer.Argument(help="Codebook: folder or Hub id.")],
    images: Annotated[str | None, typer.Option(help="The images it was built from: draws a contact sheet.")] = None,
    image_column: ImageColumn = "image",
    split: Split = "train",
    sheet: Annotated[Path, typer.Option(help="Where to write the contact sheet.")] = Path("contact-sheet.png"),
    rows: Annotated[int, typer.Option(min=0, help="Prototypes to list.")] = 10,
    overwrite: Overwrite = False,
) -> None:
    """What is in a codebook: counts, norms, cosines, where its prototypes come from."""
    from ..models.names import check_folder

    if not Path(codebook).is_file():
        check_folder(codebook, "a codebook")  # before anything slow is imported
    from ..building.images import ImageSource
    from ..building.inspection import contact_sheet, describe_codebook, provenance_of
    from ..models.codebook import RedundancyCodebook

    if images is not None:
        need_matplotlib()
        claim_file(sheet, overwrite)
    book = RedundancyCodebook.from_pretrained(codebook)
    console = Console()
    figures = Table(title=codebook, show_header=False)
    for name, value in describe_codebook(book).items():
        figures.add_row(name, value)
    console.print(figures)
    provenance = provenance_of(codebook)
    if provenance is None:
        console.print("No provenance table: the codebook was converted, or built elsewhere.")
    else:
        console.print(provenance_table(provenance, rows))
    if images is not None:
        if provenance is None:
            raise ValueError("A contact sheet needs the provenance table, which this codebook does not have.")
        shown, missing = contact_sheet(book, provenance, ImageSource(images, image_column, split), sheet)
        console.print(f"{shown} source patches: [bold]{sheet}[/bold]; {missing} images not found")


def provenance_table(provenance: list[dict[str, str]], rows: int) -> Table:
    """The first rows of a codebook's provenance, to print."""
    title = f"provenance, {min(rows, len(provenance))} of {len(provenance)} prototypes"
    table = Table(title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    for column in PROVENANCE_COLUMNS:
        heading = "#" if column == "prototype" else column.replace("_", "\n")
        table.add_column(heading, overflow="fold", no_wrap=column != "image")
    for row in provenance[:rows]:
        table.add_row(*(row[column] for column in PROVENANCE_COLUMNS))
    return table
