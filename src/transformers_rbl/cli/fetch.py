"""`rbl fetch`: codebooks that the paper's authors have released."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .output import claim
from .shared import Overwrite, app, one_sentence


@app.command()
@one_sentence
def fetch(
    name: Annotated[str | None, typer.Argument(help="Which one, see --list, e.g. llava-1.5-7b.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; default ./NAME.")] = None,
    show: Annotated[bool, typer.Option("--list", help="Name the released codebooks, and stop.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Take what was downloaded before, or stop.")] = False,
    mirror: Annotated[
        str | None, typer.Option(help="Address that serves the repository's files as MIRROR/COMMIT/PATH.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Download a codebook that the paper's authors have released, check it, and convert it.

    Files come from the authors' repository at a fixed commit, are checked by git's id of their content, and stay in the
    Hugging Face cache.
    """
    from ..hub.released import MIRROR, RELEASED

    if show:
        table = Table(title="released codebooks", box=SIMPLE, padding=(0, 1, 0, 0))
        for heading in ("name", "base model", "prototypes"):
            table.add_column(heading, overflow="fold")
        for known, codebook in RELEASED.items():
            table.add_row(known, codebook.base_model, " x ".join(map(str, codebook.shape)))
        Console().print(table)
        return
    if name not in RELEASED:
        asked = "Which codebook?" if name is None else f"No released codebook is called {name}."
        raise ValueError(f"{asked} There are {', '.join(RELEASED)}.")
    folder, codebook = out or Path(name), RELEASED[name]
    if not is_there(folder, codebook.prototypes.blob) or overwrite:
        from ..hub.cards import save_with_card
        from ..hub.released import released_codebook

        claim(folder, ("codebook.json", "codebook.safetensors"), overwrite)
        save_with_card(released_codebook(name, mirror or MIRROR, offline), folder)
    place = folder if folder.is_absolute() else f"./{folder}"
    console = Console(highlight=False)
    console.print(
        f"{place}: {' x '.join(map(str, codebook.shape))} prototypes for {codebook.base_model}. Next:", soft_wrap=True
    )
    console.print(f"rbl demo --model {codebook.base_model} --codebook {place}", soft_wrap=True)


def is_there(folder: Path, blob: str) -> bool:
    """Whether a folder holds this released codebook already."""
    try:
        source = json.loads((folder / "codebook.json").read_text(encoding="utf-8"))["built_with"]["source"]
        return source["git_blob"] == blob and (folder / "codebook.safetensors").is_file()
    except (OSError, ValueError, KeyError, TypeError):
        return False
