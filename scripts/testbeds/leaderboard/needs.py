"""What each rule needs and where it can run, told by the library itself: by a rule's arguments, and by trying."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel

from transformers_rbl import PruningConfig
from transformers_rbl.evaluation.evaluate import refusal
from transformers_rbl.integrations.serving import served_pruning
from transformers_rbl.models.scorers import SCORERS, scorer_arguments
from transformers_rbl.models.seam import MASKS

from .answers import load
from .cases import Case
from .ledger import Ledger
from .prompts import two_prompts


KEEP = 0.15
COLUMNS = ("refused", "served", "counts", "batches")
# What a scorer is given in any case.
GIVEN = {"tokens", "count", "seed", "frame"}


def needs_of_rules(scores: Sequence[str], cases: Sequence[Case], ledger: Ledger) -> dict[str, dict[str, Any]]:
    """By rule, what it needs.

    Returns:
        `dict[str, dict]`: `title`, the first line of its documentation; `reads`, the arguments that not every model or
        call has; `question_free`; `threshold`, whether it takes one; and by checkpoint `refused`, why it cannot run
        there, `served`, why an engine cannot serve it there (None if it can), `counts`, whether the number of kept
        tokens was what the layout had said before, and `batches`, whether two prompts of two lengths in one batch kept
        what each keeps alone.
    """
    needs = {score: {**_by_signature(score), **{column: {} for column in COLUMNS}} for score in scores}
    for case in {case.checkpoint: case for case in reversed(cases)}.values():
        trial, name = Trial(case), case.checkpoint.name
        for score in scores:
            found = ledger.get(("needs", name, score), functools.partial(trial.of, score))
            for column in COLUMNS:
                needs[score][column][name] = found.get(column)
    return needs


class Trial:
    """A checkpoint's model and two prompts, prepared when they are first needed."""

    def __init__(self, case: Case):
        self.case = case

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        return load(self.case)

    @functools.cached_property
    def prompts(self) -> list[BatchFeature]:
        return two_prompts(self.case)

    @torch.no_grad()
    def of(self, score: str) -> dict[str, Any]:
        """`refused`, or `served`, `counts` and `batches`."""
        pruning = PruningConfig(keep_ratio=KEEP, score=score)
        if (refused := refusal(self.model, self.prompts[1], pruning)) is not None:
            return {"refused": refused}
        together, *alone = (_masks(self.model, each, pruning) for each in self.prompts)
        layouts = self.model.model.layouts(**self.prompts[0]) or []
        return {
            "served": _why_not_served(self.model, pruning),
            "counts": [layout.kept_count(pruning) for layout in layouts] == [int(mask.sum()) for mask in together],
            "batches": all(map(torch.equal, together, [mask for each in alone for mask in each])),
        }


def _by_signature(score: str) -> dict[str, Any]:
    reads = scorer_arguments(score)
    title = (inspect.getdoc(SCORERS[score]) or "").split("\n\n")[0].replace("\n", " ")
    try:
        PruningConfig(threshold=0.5, score=score)
        threshold = True
    except ValueError:
        threshold = False
    return {
        "title": title,
        "reads": sorted(reads - GIVEN),
        "question_free": "question" not in reads,
        "threshold": threshold,
    }


def _masks(model: PreTrainedModel, inputs: BatchFeature, pruning: PruningConfig) -> list[torch.Tensor]:
    return list(model(**inputs, pruning=pruning)[MASKS["image"]])


def _why_not_served(model: PreTrainedModel, pruning: PruningConfig) -> str | None:
    config = copy.deepcopy(model.config)
    config.pruning = pruning.to_dict()
    try:
        served_pruning(config)
    except ValueError as error:
        return str(error)
    return None
