"""What evaluation found, as tables and files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .metrics import bootstrap_interval, f1, paired_ratio_interval


WORDS = "Retention is the share of visual tokens that stay, row ends aside; the counts have them in."


@dataclass
class RuleResult:
    """What one rule came to.

    Args:
        name (`str`): the rule in words.
        pruning (`dict`): its settings.
        retention (`float`): mean share of visual tokens kept, row ends aside: what `keep_ratio` and `rbl calibrate`
            speak of.
        tokens (`float`): mean visual tokens kept a question, row ends counted.
        correct (`dict[str, list[float]]`): per metric, 0 or 1 for each question.
        answers (`list[str]`): what the model said.
        prefill_ms, cache_mib (`float`, *optional*): medians over the first questions.
    """

    name: str
    pruning: dict[str, Any]
    retention: float = 0.0
    tokens: float = 0.0
    correct: dict[str, list[float]] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    prefill_ms: float | None = None
    cache_mib: float | None = None


def unpruned(results: Sequence[RuleResult]) -> RuleResult:
    """The unpruned model's result, the first one.

    Raises:
        ValueError: if there is none.
    """
    if not results:
        raise ValueError("There are no results: evaluate some questions first.")
    return results[0]


def table_rows(results: Sequence[RuleResult], references: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the results: accuracy with its interval, and the share of the unpruned one with its.

    Args:
        results (`Sequence[RuleResult]`): of [`evaluate`], the unpruned model first.
        references (`Sequence[Sequence[str]]`): every question's answers.

    Raises:
        ValueError: if there are no results.
    """
    correct = unpruned(results).correct
    columns = ["rule", "retention", "visual tokens"]
    for name in correct:
        columns += [name, f"{name}, of unpruned"]
    columns += ["yes F1"] if "yes_no" in correct else []
    columns += ["prefill ms", "KV cache MiB"]
    rows = []
    for result in results:
        row = [result.name, f"{result.retention:.1%}", f"{result.tokens:.1f}"]
        for name, base_values in correct.items():
            values, base = np.array(result.correct[name]), np.array(base_values)
            low, high = bootstrap_interval(values)
            row.append(f"{values.mean():.1%} [{low:.1%}, {high:.1%}]")
            below, above = paired_ratio_interval(values, base)
            share = values.mean() / base.mean() if base.mean() > 0 else float("nan")
            row.append(f"{share:.1%} [{below:.1%}, {above:.1%}]")
        if "yes F1" in columns:
            row.append(f"{f1(result.answers, references):.3f}")
        rows.append([*row, f"{result.prefill_ms:.1f}", f"{result.cache_mib:.2f}"])
    return columns, rows
