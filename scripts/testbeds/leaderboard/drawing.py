"""The leaderboard's pictures: accuracy against retention, and what a rule kept of a scene where it lost most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from transformers_rbl.evaluation.metrics import bootstrap_interval
from transformers_rbl.evaluation.plots import dim_dropped

from .answers import ORACLE, RESIZED
from .page import uses_codebook
from .standing import Standing, mean_places


SHOWN = 4  # rules without a codebook that are drawn in colour, beside random and resizing


def plot_standings(standings: Sequence[Standing], needs: dict[str, dict], path: Path) -> None:
    """A panel a checkpoint: rules that read the codebook as thick lines, the best of the others as thin ones, the rest
    in grey."""
    ratios = standings[0].retentions
    names = list(mean_places(standings, ratios))
    with_book = [name for name in names if uses_codebook(name, needs) and "," not in name]
    others = [name for name in names if not uses_codebook(name, needs) and "," not in name]
    coloured = others[:SHOWN] + [name for name in ("random", RESIZED) if name in others[SHOWN:]]
    columns = min(3, len(standings))
    rows = -(-len(standings) // columns)
    figure = Figure(figsize=(4.4 * columns, 3.7 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    colours = {name: f"C{number}" for number, name in enumerate([*with_book, *coloured])}
    for axis, standing in zip(axes, standings):
        axis.axhline(
            100 * standing.unpruned.accuracy.mean(), color="black", linestyle="--", linewidth=1, label="unpruned"
        )
        axis.axhline(100 * standing.blind.accuracy.mean(), color="grey", linestyle=":", linewidth=1, label="no image")
        for name in [name for name in others if name not in coloured and name in standing.rules]:
            _line(axis, standing, name, color="lightgrey", linewidth=0.8)
        for name in [name for name in (*coloured, *with_book) if name in standing.rules]:
            _line(axis, standing, name, color=colours[name], linewidth=2.2 if name in with_book else 1.1, label=name)
        _line(axis, standing, ORACLE, color="black", linewidth=1.3, label="oracle", bars=True)
        axis.set_xscale("log")
        axis.set_xticks([100 * ratio for ratio in ratios], [f"{ratio:.0%}" for ratio in ratios])
        axis.minorticks_off()
        axis.set(title=standing.name, ylim=(0, 102), xlabel="visual tokens kept")
    for axis in axes[::columns]:
        axis.set_ylabel("accuracy, %")
    for axis in axes[len(standings) :]:
        axis.axis("off")
    labelled = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


def _line(axis: Axes, standing: Standing, name: str, bars: bool = False, **style: object) -> None:
    runs = [standing.runs[(name, ratio)] for ratio in standing.retentions]
    mean = np.array([100 * run.accuracy.mean() for run in runs])
    at = [100 * run.wanted for run in runs]
    if not bars:
        axis.plot(at, mean, **style)
        return
    ends = np.array([[100 * end for end in bootstrap_interval(run.accuracy)] for run in runs]).T
    axis.errorbar(at, mean, yerr=np.abs(ends - mean), capsize=2, **style)


@dataclass(frozen=True)
class Lost:
    """One image of a scene: what two rules kept of it, as grids `(rows, columns)` over it.

    Args:
        checkpoint (`str`): whose.
        image (`np.ndarray` of shape `(height, width, 3)`): uint8.
        subject (`np.ndarray`): bool, the tokens that show what questions ask about.
        kept (`dict[str, np.ndarray]`): bool, by rule, the first one the better.
    """

    checkpoint: str
    image: np.ndarray
    subject: np.ndarray
    kept: dict[str, np.ndarray]


def plot_lost(scenes: Sequence[Lost], path: Path) -> None:
    """A row a scene: the image, then what each rule keeps; what it asks about and the rule dropped is framed in red."""
    figure = Figure(figsize=(8.4, 2.9 * len(scenes)), layout="constrained")
    axes = figure.subplots(len(scenes), 3, squeeze=False)
    for line, scene in zip(axes, scenes):
        image = Image.fromarray(scene.image)
        line[0].imshow(image)
        line[0].set_title(scene.checkpoint, fontsize=9)
        for axis, (rule, grid) in zip(line[1:], scene.kept.items()):
            axis.imshow(dim_dropped(image, grid))
            found = (grid & scene.subject).sum() / max(scene.subject.sum(), 1)
            axis.set_title(f"{rule}: {int(grid.sum())} of {grid.size}, {found:.0%} of the answer", fontsize=9)
            height, width = (length / cells for length, cells in zip(scene.image.shape, grid.shape))
            for row, column in zip(*np.nonzero(scene.subject & ~grid)):
                corner = (column * width - 0.5, row * height - 0.5)
                axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="red", linewidth=1.5))
        for axis in line:
            axis.axis("off")
    figure.savefig(path, dpi=90)
