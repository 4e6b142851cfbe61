"""Train a testbed's model from scratch, on a CPU.

python scripts/testbeds train outputs/testbed-next --family llava_next --seed 0

Deterministic by seed (on one machine, with as many threads); killed, it goes on from its last saved step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from .registry import TESTBEDS, Family, TestbedName, check_family


def main(
    folder: Annotated[Path, typer.Argument(help="Where log, state and the checkpoints `answer` and `window` go.")],
    family: Family = "llava_next",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    window: Annotated[bool, typer.Option(help="Whether the window stage runs.")] = True,
    shorten: Annotated[float, typer.Option(min=1, help="Divide every stage's steps by this: a smoke run.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    testbed_name: TestbedName = "digits",
) -> None:
    """Train a small model from scratch on a testbed's training data."""
    testbed = TESTBEDS[testbed_name]
    check_family(testbed, family)
    torch.set_num_threads(threads)
    stages = [stage for stage in testbed.stages[family] if window or stage.name != "window"]
    stages = [replace(stage, steps=max(1, round(stage.steps / shorten))) for stage in stages]
    trainer = testbed.trainer(family, seed, folder, stages)
    trainer.run()
    print(f"{folder}: {trainer.spent:.0f} CPU seconds")
