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


def needs_of_rules(score: str, cases: Sequence[Case], ledger: Ledger) -> dict[str, Any]:
    """What a rule needs.

    Returns:
        `dict`: `title`, the first line of its documentation; `reads`, the arguments that not every model or call has;
        `question_free`; `threshold`, whether it takes one; and by checkpoint `refused`, why it cannot run there,
        `served`, why an engine cannot serve it there (None if it can), `counts`, whether the number of kept tokens was
        what the layout had said before, and `batches`, whether two prompts of two lengths in one batch kept what each
        keeps alone.
    """
    tried = {}
    for case in cases:
        name = case.checkpoint.name
        if name not in tried:
            tried[name] = ledger.get(("needs", name, score), functools.partial(_try, case, score))
    columns = {column: {name: each.get(column) for name, each in tried.items()} for column in COLUMNS}
    return {**_by_signature(score), **columns}


@torch.no_grad()
def _try(case: Case, score: str) -> dict[str, Any]:
    """`refused`, `served`, `counts` and `batches` on one checkpoint."""
    model, inputs = load(case), two_prompts(case)
    pruning = PruningConfig(keep_ratio=KEEP, score=score)
    if (refused := refusal(model, inputs[1], pruning)) is not None:
        return {"refused": refused}
    together, *alone = (_masks(model, each, pruning) for each in inputs)
    layouts = model.model.layouts(**inputs[0]) or []
    return {
        "served": _why_not_served(model, pruning),
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
