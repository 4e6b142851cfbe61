"""`rbl verify`: the library's contracts on a user's own checkpoint and installation."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .shared import Device, Dtype, app, check_model, check_placement, one_sentence


@app.command()
@one_sentence
def verify(
    model: Annotated[
        str | None,
        typer.Argument(help="Stock or pruned checkpoint: folder or Hub id. Default: codebooks/digits-llava-next."),
    ] = None,
    codebook: Annotated[
        str | None, typer.Option(help="Folder or Hub id. Default: the checkpoint's, else tokens of the picture.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to ask about; one is drawn without it.")] = None,
    keep_ratio: Annotated[float, typer.Option(help="Share of visual tokens to keep, in (0, 1].")] = 0.2,
    score: Annotated[str, typer.Option(help="Which rule drops tokens, e.g. codebook_dpp.")] = "cosine",
    merge: Annotated[str, typer.Option(help="none, or nearest: average dropped tokens into kept ones.")] = "none",
    keep_positions: Annotated[
        bool, typer.Option("--keep-positions", help="What stays keeps its positions; by default gaps close.")
    ] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Check the library's contracts on your checkpoint and installation. Status 1 if one is broken."""
    check_model(model)
    from ..demo.loading import default_model
    from ..verify import FAILED, verify_checkpoint

    check_placement(dtype, device)
    if model is None:
        try:
            model = str(default_model())
        except ValueError:
            raise ValueError("No checkout is here to take a model from: give MODEL, a folder or Hub id.") from None
    report = verify_checkpoint(model, codebook, image, keep_ratio, device, dtype, score, merge, keep_positions)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)  # to be pasted
        for facts in (report.versions, report.settings):
            console.print(", ".join(f"{name} {value}" for name, value in facts.items()), markup=False, soft_wrap=True)
        table = Table("contract", "result", "figure")
        for check in report.checks:
            style = "bold red" if check.result == FAILED else None
            table.add_row(*(escape(cell) for cell in (check.name, check.result, check.figure)), style=style)
        console.print(table)
    if not report.passed:
        raise typer.Exit(1)
