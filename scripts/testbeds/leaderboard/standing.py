"""From right answers to standings: accuracy kept, differences to the best rule, and ranks over checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transformers_rbl.evaluation.metrics import bootstrap_interval, paired_ratio_interval

from .answers import NO_IMAGE, ORACLE, REFERENCES, UNPRUNED


@dataclass(frozen=True)
class Run:
    """One rule at one retention on one checkpoint.

    Args:
        rule, merge (`str`), wanted (`float`): which; `wanted` is the share to keep.
        kept (`float`): the share that it kept.
        accuracy (`np.ndarray` of shape `(examples,)`): share of an example's questions that were answered rightly.
        found (`float`, *optional*): share of what questions ask about that was kept.
        shows (`dict[str, float]`): what the kept tokens show, in shares.
    """

    rule: str
    merge: str
    wanted: float
    kept: float
    accuracy: np.ndarray
    found: float | None
    shows: dict[str, float]

    @property
    def name(self) -> str:
        return self.rule if self.merge == "none" else f"{self.rule}, merge {self.merge}"


class Standing:
    """All runs of one checkpoint.

    Args:
        about (`dict`): `name`, `questions` and the rest that the command wrote of the case.
        rows (`Sequence[dict]`): of [`answers.answer_all`].
    """

    def __init__(self, about: dict[str, Any], rows: Sequence[dict]):
        self.about, self.name = about, about["name"]
        self.refused = {row["rule"]: row["refused"] for row in rows if "refused" in row}
        questions = len(about["questions"])
        self.runs: dict[tuple[str, float], Run] = {}
        for row in rows:
            if "refused" in row:
                continue
            accuracy = np.array([int(digit) for digit in row["right"]]) / questions
            run = Run(
                row["rule"], row["merge"], row["wanted"], row["kept"], accuracy, row.get("found"), row.get("shows", {})
            )
            self.runs[(run.name, run.wanted)] = run

    @property
    def unpruned(self) -> Run:
        return self.runs[(UNPRUNED, 1.0)]

    @property
    def blind(self) -> Run:
        return self.runs[(NO_IMAGE, 0.0)]

    @property
    def retentions(self) -> list[float]:
        return sorted({wanted for name, wanted in self.runs if name == ORACLE}, reverse=True)

    @property
    def rules(self) -> list[str]:
        """Names of what competes: rules with and without merging, and resizing."""
        return list(dict.fromkeys(name for (name, _), run in self.runs.items() if run.rule not in REFERENCES))

    def at(self, wanted: float) -> list[str]:
        """Those of the rules that ran at a retention: merging may be asked about at some of them only."""
        return [name for name in self.rules if (name, wanted) in self.runs]

    def share(self, name: str, wanted: float) -> float:
        """Accuracy as a share of the unpruned model's."""
        return float(self.runs[(name, wanted)].accuracy.mean() / self.unpruned.accuracy.mean())

    def interval(self, name: str, wanted: float) -> tuple[float, float]:
        """Of the share, over examples."""
        return paired_ratio_interval(self.runs[(name, wanted)].accuracy, self.unpruned.accuracy)

    def best(self, wanted: float, names: Sequence[str] | None = None) -> str:
        """The most accurate of the rules that ran there, or of those of `names`."""
        ran = [name for name in self.at(wanted) if names is None or name in names]
        return max(ran, key=lambda name: self.share(name, wanted))

    def gap(self, name: str, other: str, wanted: float) -> tuple[float, float, float]:
        """Accuracy of one minus another, in points of accuracy, with its paired interval over examples."""
        points = 100 * (self.runs[(name, wanted)].accuracy - self.runs[(other, wanted)].accuracy)
        return (float(points.mean()), *bootstrap_interval(points))


def everywhere(standings: Sequence[Standing]) -> list[str]:
    """Names of the rules that ran on all checkpoints."""
    return [name for name in standings[0].rules if all(name in each.rules for each in standings)]


def mean_places(standings: Sequence[Standing], retentions: Sequence[float]) -> dict[str, float]:
    """By rule, its mean place over checkpoints and retentions, best first: 1 plus the number of rules that were better,
    equals half. It is counted among the rules that ran on all checkpoints, so that one that a tower cannot give does
    not shift the others' places; such a rule's own mean is over the checkpoints that ran it."""
    rivals, places = everywhere(standings), {}
    for standing in standings:
        for wanted in retentions:
            for name in standing.at(wanted):
                own = standing.runs[(name, wanted)].accuracy.mean()
                rest = [other for other in standing.at(wanted) if other in rivals and other != name]
                others = np.array([standing.runs[(other, wanted)].accuracy.mean() for other in rest])
                places.setdefault(name, []).append(1 + (others > own).sum() + (others == own).sum() / 2)
    return dict(sorted(((name, float(np.mean(found))) for name, found in places.items()), key=lambda item: item[1]))
