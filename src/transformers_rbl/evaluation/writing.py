"""Files of an evaluation: JSON, a page, and its plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plots import plot_accuracy
from .results import WORDS, RuleResult, table_rows


def write_results(
    folder: Path, results: Sequence[RuleResult], references: Sequence[Sequence[str]], about: dict[str, Any]
) -> None:
    """Write `results.json`, `results.md` and `accuracy.png`.

    Args:
        folder (`Path`): made if missing.
        results (`Sequence[RuleResult]`): of [`evaluate`], the unpruned model first.
        references (`Sequence[Sequence[str]]`): every question's answers.
        about (`dict[str, Any]`): what was evaluated, by name; JSON types only.

    Raises:
        ValueError: if there are no results.
    """
    columns, rows = table_rows(results, references)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# {about.get('model', '')}", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    (folder / "results.md").write_text(
        "\n".join([*lines, "", WORDS, "", "![Accuracy against retention](accuracy.png)", ""])
    )
    content = {"about": about, "results": [vars(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    plot_accuracy(results, folder / "accuracy.png")
