"""The results page's tables and plot, from what `scenes-compare` wrote.

python scripts/testbeds scenes-tables docs/results/scenes/test.json --plot docs/results/scenes/test.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from transformers_rbl.evaluation.metrics import bootstrap_interval, paired_ratio_interval

from ..report import plot as plot_rules
from ..report import read


Bits = np.ndarray  # `(scenes, questions)`, 1 for a right answer


class Results:
    """One file of `scenes-compare`, without a kind of question if one is named."""

    def __init__(self, path: Path, without: str | None = None):
        content = json.loads(path.read_text())
        self.about, self.rows = content["about"], {(row["rule"], row["wanted"]): row for row in content["results"]}
        self.retentions = sorted({wanted for name, wanted in self.rows if name == "oracle"}, reverse=True)
        self.names = list(dict.fromkeys(name for name, wanted in self.rows if wanted in self.retentions))

        every = self.about["questions"]
        self.columns = [place for place, kind in enumerate(every) if kind != without]
        self.about = {**self.about, "questions": [every[place] for place in self.columns]}

    def bits(self, name: str, wanted: float) -> Bits:
        rows = np.array([[int(bit) for bit in row] for row in self.rows[name, wanted]["right"]])
        return rows[:, self.columns]

    def scenes(self, name: str, wanted: float) -> np.ndarray:
        """`(scenes,)`: the share of each scene's questions that were answered right."""
        return self.bits(name, wanted).mean(1)


def head(first: str, retentions: list[float]) -> list[str]:
    return [
        f"| {first} | " + " | ".join(f"{ratio:.0%}" for ratio in retentions) + " |",
        "| --- |" + " --- |" * len(retentions),
    ]


def percent(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def summary(results: Results) -> str:
    about, base = results.about, results.scenes("unpruned", 1.0)
    low, high = bootstrap_interval(base)
    return (
        f"{about['examples']} scenes ({about['split']}), {len(about['questions'])} questions each; things touch "
        f"{about['thing_tokens']:.1%} of {about['visual_tokens']} tokens; prototypes: "
        f"{', '.join(f'{count} ({name})' for name, count in about['prototypes'].items()) or 'none'}.\n\n"
        f"Unpruned **{percent(base.mean(), low, high)}%**; without the image "
        f"{100 * results.scenes('no image', 0.0).mean():.1f}%."
    )


def shares(results: Results) -> list[str]:
    """Share of the unpruned accuracy, with its 95% interval over scenes."""
    base, lines = results.scenes("unpruned", 1.0), head("rule", results.retentions)
    for name in results.names:
        cells = []
        for ratio in results.retentions:
            if (name, ratio) not in results.rows:
                cells.append("")
                continue
            values = results.scenes(name, ratio)
            cells.append(percent(values.mean() / base.mean(), *paired_ratio_interval(values, base)))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def differences(results: Results, main: str) -> list[str]:
    """Accuracy of the main codebook minus that of each other rule, in points."""
    lines = head("codebook minus, in points", results.retentions)
    others = [name for name in results.names if name != main]
    return lines + [gaps(name, results, main, results, name) for name in others]


def gains(results: Results, closed: Results) -> list[str]:
    """What kept positions add to the accuracy of each rule, in points."""
    lines = head("own positions minus closed up, in points", results.retentions)
    return lines + [gaps(name, results, name, closed, name) for name in results.names]


def gaps(label: str, results: Results, name: str, others: Results, other: str) -> str:
    """A row: accuracy of a rule minus that of another on the same scenes, in points, where both were asked."""
    cells = []
    for ratio in results.retentions:
        if (name, ratio) not in results.rows or (other, ratio) not in others.rows:
            cells.append("")
            continue
        gap = results.scenes(name, ratio) - others.scenes(other, ratio)
        cells.append(percent(gap.mean(), *bootstrap_interval(gap), sign="+"))
    return f"| {label} | " + " | ".join(cells) + " |"


def things_kept(results: Results) -> list[str]:
    lines = head("share of the things' patches kept", results.retentions)
    for name in results.names:
        cells = [results.rows.get((name, ratio)) for ratio in results.retentions]
        lines.append(f"| {name} | " + " | ".join(f"{cell['things_kept']:.2f}" if cell else "" for cell in cells) + " |")
    return lines


def kinds(results: Results, retentions: tuple[float, ...] = (0.15, 0.05)) -> list[str]:
    """Accuracy by kind of question."""
    names = results.about["questions"]
    lines = ["| accuracy, % | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    rows = [("unpruned", 1.0), ("no image", 0.0), *((name, ratio) for ratio in retentions for name in results.names)]
    for name, ratio in rows:
        if (name, ratio) in results.rows:
            label = name if name in ("unpruned", "no image") else f"{name}, {ratio:.0%}"
            each = results.bits(name, ratio).mean(0)
            lines.append(f"| {label} | " + " | ".join(f"{100 * share:.0f}" for share in each) + " |")
    return lines


def main(
    results: Annotated[Path, typer.Argument(help="A file of scenes-compare.")],
    picture: Annotated[Path | None, typer.Option("--plot", help="Picture to write.")] = None,
    title: Annotated[str, typer.Option()] = "Scenes, SmolLM2-135M",
    without: Annotated[str | None, typer.Option(help="A kind of question to leave out of the tables.")] = None,
    closed: Annotated[
        Path | None, typer.Option(help="A file about the same scenes with positions closed up, to compare with.")
    ] = None,
) -> None:
    """Print the Markdown tables of docs/results/scenes.md, and draw accuracy against retention."""
    read_results = Results(results, without)
    codebooks = [name for name in read_results.names if name.startswith("codebook: ")]
    parts = [[summary(read_results)], shares(read_results)]
    if codebooks:
        parts.append(differences(read_results, codebooks[0]))
    if closed is not None:
        parts.append(gains(read_results, Results(closed, without)))
    parts += [things_kept(read_results), kinds(read_results)]
    print("\n\n".join("\n".join(part) for part in parts))
    if picture is not None:
        plot_rules(read([results])[1], title, picture)
