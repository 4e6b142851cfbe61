"""The testbeds by name, and the options that several commands have."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .digits import DIGITS
from .scenes import SCENES
from .testbed import Testbed


TESTBEDS = {"digits": DIGITS, "scenes": SCENES}
TestbedName = Annotated[Literal["digits", "scenes"], typer.Option("--testbed", help="Whose data.")]
Family = Annotated[str, typer.Option(help="llava, llava_next, llava_onevision or qwen3_vl.")]
Kind = Annotated[Literal["image", "images", "video"], typer.Option(help="What its model is shown.")]
Split = Annotated[Literal["train", "validation", "test"], typer.Option()]


def check_family(testbed: Testbed, family: str) -> None:
    """
    Raises:
        typer.BadParameter: if the testbed has no model of the family.
    """
    if family not in testbed.kinds:
        raise typer.BadParameter(f"--family is one of {', '.join(testbed.kinds)}, not {family}.")
