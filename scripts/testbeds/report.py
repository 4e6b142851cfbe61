"""Tables and a plot from the files that compare-rules wrote: accuracy against retention, with 95% intervals.

python scripts/testbeds report docs/results/testbed/next-seed?.json --plot docs/results/testbed/next.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from transformers_rbl.evaluation.metrics import bootstrap_interval, paired_ratio_interval

from .registry import TESTBEDS, TestbedName


class Rule:
    """What one rule got right at one retention, over all models: `values` `(models, examples)`, shares of an example's
    questions."""

    def __init__(self, name: str, wanted: float):
        self.name, self.wanted = name, wanted
        self.kept: list[float] = []
        self.values: list[np.ndarray] = []

    @property
    def examples(self) -> np.ndarray:
        """`(examples,)`: means over models, which all answered the same examples. Resampling these keeps what the
        models have in common."""
        return np.mean(self.values, axis=0)


def read(paths: list[Path]) -> tuple[list[dict], dict[tuple[str, float], Rule]]:
    """The files' headers, and every rule by name and wanted retention."""
    abouts, rules = [], {}
    for path in paths:
        content = json.loads(path.read_text())
        abouts.append(content["about"])
        for row in content["results"]:
            rule = rules.setdefault((row["rule"], row["wanted"]), Rule(row["rule"], row["wanted"]))
            rule.kept.append(row["kept"])
            rule.values.append(np.array([[int(bit) for bit in bits] for bits in row["right"]]).mean(1))
    same = ("family", "kind", "split", "examples", "seed")
    if any(about[name] != abouts[0][name] for about in abouts for name in same):
        raise ValueError("These files are not of the same examples: they have no common table.")
    if any(len(rule.values) != len(paths) for rule in rules.values()):
        raise ValueError("These files do not hold the same rules.")
    return abouts, rules


def share(rule: Rule, base: Rule) -> str:
    low, high = paired_ratio_interval(rule.examples, base.examples)
    value = f"{100 * rule.examples.mean() / base.examples.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    if len(rule.values) == 1:
        return value
    each = [100 * values.mean() / other.mean() for values, other in zip(rule.values, base.values)]
    return f"{value} ({', '.join(f'{v:.0f}' for v in each)})"


def difference(one: Rule, other: Rule) -> tuple[float, float, float]:
    """Accuracy of one minus another in points, with its paired 95% interval."""
    gap = 100 * (one.examples - other.examples)
    return (float(gap.mean()), *bootstrap_interval(gap))


def tables(abouts: list[dict], rules: dict[tuple[str, float], Rule], subject: str) -> str:
    """Markdown: what was asked, every rule's share of the unpruned accuracy, and the codebook's lead over others."""
    base, floor = rules[("unpruned", 1.0)], rules[("no image", 0.0)]
    low, high = bootstrap_interval(base.examples)
    each = ", ".join(f"{100 * values.mean():.1f}" for values in base.values)
    about = abouts[0]
    sizes = ", ".join(str(next(iter(each["prototypes"].values()))) for each in abouts if each["prototypes"])
    lines = [
        f"{about['kind']}, {about['split']} split, {about['examples']} examples of four questions "
        f"({', '.join(about['questions'])}), {about['visual_tokens']:.0f} visual tokens, of which a {subject} touches "
        f"{about[f'{subject}_tokens']:.1%}; prototypes: {sizes or 'no codebook was built'}.",
        "",
        f"Unpruned accuracy **{100 * base.examples.mean():.1f}%** [{100 * low:.1f}, {100 * high:.1f}]"
        + (f" (models: {each})" if len(abouts) > 1 else "")
        + f"; without the image {100 * floor.examples.mean():.1f}%.",
        "",
    ]
    ratios = sorted({wanted for name, wanted in rules if name == "oracle"}, reverse=True)
    lines += ["| rule | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |", "| --- |" + " --- |" * len(ratios)]
    names = list(dict.fromkeys(name for name, wanted in rules if (name, ratios[0]) in rules))
    for name in names:
        lines.append(f"| {name} | " + " | ".join(share(rules[(name, ratio)], base) for ratio in ratios) + " |")
    thresholds = [rule for (name, _), rule in rules.items() if name == "codebook, threshold"]
    thresholds.sort(key=lambda rule: -np.mean(rule.kept))
    if thresholds:
        lines += ["", "| threshold | retention | of unpruned |", "| --- | --- | --- |"]
        for rule in thresholds:
            lines.append(f"| {rule.wanted} | {np.mean(rule.kept):.1%} | {share(rule, base)} |")
    if not sizes:
        return "\n".join(lines) + "\n"
    main = next(name for name in names if name.startswith("codebook: "))
    others = [name for name in names if name not in (main, "oracle") and not name.startswith("codebook")]
    lines += ["", "| codebook minus, in points | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |"]
    lines.append("| --- |" + " --- |" * len(ratios))
    best = {ratio: max(others, key=lambda name: rules[(name, ratio)].examples.mean()) for ratio in ratios}
    rows = {
        "random": dict.fromkeys(ratios, "random"),
        "best baseline": best,
        "random-token codebook": dict.fromkeys(ratios, "codebook: random tokens"),
        "oracle": dict.fromkeys(ratios, "oracle"),
    }
    for label, chosen in rows.items():
        cells = []
        for ratio in ratios:
            gap, below, above = difference(rules[(main, ratio)], rules[(chosen[ratio], ratio)])
            name = f" ({chosen[ratio]})" if label == "best baseline" else ""
            cells.append(f"{gap:+.1f} [{below:+.1f}, {above:+.1f}]{name}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rules: dict[tuple[str, float], Rule], title: str, path: Path) -> None:
    """Accuracy against retention, of the rules that tell most."""
    from matplotlib.figure import Figure

    base, floor = rules[("unpruned", 1.0)], rules[("no image", 0.0)]
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    axis.axhline(100 * base.examples.mean(), color="black", linestyle="--", label="unpruned")
    axis.axhline(100 * floor.examples.mean(), color="grey", linestyle=":", label="no image")
    main = next(name for name, _ in rules if name.startswith("codebook: "))
    shown = {
        main: "codebook (the method)",
        "oracle": "oracle",
        "codebook: random tokens": "codebook of random tokens",  # also where no codebook was built
        "cls_attention": "[cls] attention",
        "diversity": "diversity (DivPrune)",
        "random": "random",
    }
    for name, label in shown.items():
        points = sorted((rule for (other, _), rule in rules.items() if other == name), key=lambda rule: rule.wanted)
        if not points:
            continue
        mean = np.array([100 * rule.examples.mean() for rule in points])
        spread = np.array([[100 * v for v in bootstrap_interval(rule.examples)] for rule in points]).T
        style = {"linewidth": 2.5} if name == main else {"linewidth": 1.2}
        ratios, errors = [100 * rule.wanted for rule in points], np.abs(spread - mean)
        axis.errorbar(ratios, mean, yerr=errors, marker="o", markersize=4, capsize=2, label=label, **style)
    ticks = sorted({100 * rule.wanted for (name, _), rule in rules.items() if name == "oracle"})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:.0f}%" for tick in ticks])
    axis.minorticks_off()
    axis.set(xlabel="visual tokens kept", ylabel="accuracy, %", ylim=(0, 102), title=title)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    results: Annotated[list[Path], typer.Argument(help="Files of one kind and split; one a model.")],
    picture: Annotated[Path | None, typer.Option("--plot", help="Picture to write.")] = None,
    title: Annotated[str, typer.Option()] = "",
    testbed_name: TestbedName = "digits",
) -> None:
    """Print Markdown tables, and draw accuracy against retention."""
    abouts, rules = read(results)
    print(tables(abouts, rules, TESTBEDS[testbed_name].subject))
    if picture is not None:
        plot(rules, title, picture)
