"""`rbl`: build, fetch, inspect, compress and convert codebooks; evaluate and calibrate pruned models."""

from __future__ import annotations

from typing import Annotated

import typer

# A command is a file beside this one: a function under `@app.command()` and `@one_sentence`. To add one, write the file
# and name it here. Commands import torch, transformers and the library inside their function, so that help comes fast.
from . import build, calibrate, compress, convert, demo, evaluate, fetch, inspect, publish, verify  # noqa: F401
from .shared import app


__all__ = ["app"]


def print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(f"transformers_rbl {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """Codebooks of redundant visual tokens for vision-language models."""
