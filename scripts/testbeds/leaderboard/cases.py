"""What the leaderboard is about: the committed checkpoints of every testbed, with each kind of input of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from ..registry import TESTBEDS
from ..testbed import Testbed
from ..tokens import family_of


CHECKPOINTS = Path(__file__).resolve().parents[3] / "codebooks"


@dataclass(frozen=True)
class Case:
    """One checkpoint, asked about one kind of input."""

    testbed: Testbed
    checkpoint: Path
    family: str
    kind: str

    @property
    def name(self) -> str:
        return self.checkpoint.name + (f", {self.kind}" if len(self.testbed.kinds[self.family]) > 1 else "")


def committed_cases(folder: Path = CHECKPOINTS) -> Iterator[Case]:
    """A case for every checkpoint `TESTBED-…` below `folder` and every kind of input that its family is asked about."""
    for testbed in TESTBEDS.values():
        for config in sorted(folder.glob(f"{testbed.name}-*/config.json")):
            family = family_of(AutoConfig.from_pretrained(config.parent))
            for kind in testbed.kinds[family]:
                yield Case(testbed, config.parent, family, kind)
