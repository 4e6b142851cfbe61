"""What a build measured, as pictures and Markdown: what the thresholds cut, and what they would keep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..models.codebook import RedundancyCodebook
from .recipe import Recipe
from .records import write_whole
from .selection import Probe, Selection, divergence


if TYPE_CHECKING:
    from matplotlib.figure import Figure


THRESHOLDS = np.linspace(0.0, 1.0, 101)
LISTED = 50


def write_report(
    out: Path,
    book: RedundancyCodebook,
    probes: list[Probe],
    held_out: list[tuple[str, torch.Tensor]],
    selection: Selection,
    recipe: Recipe,
    missing: int,
    skipped: list[tuple[str, str]],
) -> None:
    """Write `report.md` and its pictures under `report/`.

    Args:
        out (`Path`): folder to write to.
        book ([`RedundancyCodebook`]): the codebook.
        probes (`list[Probe]`): what was measured.
        held_out (`list[tuple[str, torch.Tensor]]`): names and tokens `(n, d)` of images that were not probed.
        selection ([`Selection`]): which tokens became prototypes.
        recipe ([`Recipe`]): by which settings.
        missing (`int`): images without a record.
        skipped (`list[tuple[str, str]]`): names of images that could not be read, and why, as far as it is known.
    """
    pictures = out / "report"
    pictures.mkdir(parents=True, exist_ok=True)
    parts = ["# How this codebook was built", "", "| condition | tokens left |", "| --- | --- |"]
    parts += [f"| {name} | {count} |" for name, count in selection.funnel]
    parts += [
        "",
        f"{len(book.prototypes)} prototypes of width {book.prototypes.shape[1]} from {len(probes)} probed images, "
        f"{len(set(selection.image.tolist()))} of which gave one.",
        "",
        "## Retention against threshold",
        "",
    ]
    if held_out:
        retention = retention_curve(book, [tokens for _, tokens in held_out])
        _plot_retention(pictures / "retention.png", retention)
        parts += [
            f"Share of base-image tokens whose largest cosine is below the threshold, on {len(held_out)} images that "
            "were not probed; mean, lowest and highest image.",
            "",
            "![Retention against threshold](report/retention.png)",
            "",
            "| retention | threshold |",
            "| --- | --- |",
        ]
        mean = retention.mean(axis=0)
        for share in (0.05, 0.1, 0.15, 0.2, 0.3, 0.5):
            reached = np.flatnonzero(mean >= share)
            if len(reached):
                parts.append(f"| {share:.0%} | {THRESHOLDS[reached[0]]:.2f} |")
    else:
        parts.append("No image was held out (fewer than ten were given, or the recipe holds none out).")

    _plot_measures(pictures / "measures.png", probes, selection, recipe)
    _plot_clusters(pictures / "clusters.png", selection, recipe)
    parts += ["", "## What was measured", "", "![p1 and divergences, with their thresholds](report/measures.png)"]
    parts += ["", "## Clusters over all images", "", "![Cluster sizes and distinct images](report/clusters.png)"]
    parts += ["", "## Candidates", ""]
    if _plot_candidates(pictures / "candidates.png", probes, selection, recipe):
        parts += ["![t-SNE of the candidates](report/candidates.png)", ""]
    else:
        parts += ["Too few candidates for a t-SNE picture.", ""]
    parts += [f"## Tokens within 1e-5 of a threshold: {len(selection.borderline)}", ""]
    if selection.borderline:
        parts += ["Another device or batch size may put these on the other side.", ""]
        parts += [
            f"- {image}, position {position}: {name} {value:.8g}"
            for image, position, name, value in selection.borderline[:LISTED]
        ]
        parts += _more(len(selection.borderline))
    parts += ["", f"## Images that could not be read: {missing}", ""]
    parts += [f"- {name}: {why}" for name, why in skipped[:LISTED]] + _more(len(skipped))
    write_whole(out / "report.md", ("\n".join(parts).rstrip() + "\n").encode())


def retention_curve(book: RedundancyCodebook, images: list[torch.Tensor]) -> np.ndarray:
    """Share of each image's tokens that thresholds 0, 0.01 … 1 keep.

    Args:
        book ([`RedundancyCodebook`]): the codebook.
        images (`list[torch.Tensor]`): tokens `(n, d)` of each image, one image at least.

    Returns:
        `np.ndarray` of shape `(images, 101)`, float64.
    """
    scores = [book.score(tokens).numpy() for tokens in images]
    return np.stack([(score[:, None] < THRESHOLDS).mean(axis=0) for score in scores])


def _more(count: int) -> list[str]:
    return [f"- and {count - LISTED} more"] if count > LISTED else []


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """A figure and its axes `(columns,)`, beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _plot_retention(path: Path, retention: np.ndarray) -> None:
    figure, (axis,) = _figure(6, 4)
    axis.fill_between(THRESHOLDS, retention.min(axis=0), retention.max(axis=0), alpha=0.2)
    axis.plot(THRESHOLDS, retention.mean(axis=0))
    axis.set(xlabel="threshold (cosine)", ylabel="retention (share kept)", ylim=(0, 1), xlim=(0, 1))
    figure.savefig(path, dpi=110)


def _plot_measures(path: Path, probes: list[Probe], selection: Selection, recipe: Recipe) -> None:
    kind = recipe.divergence
    values = {
        "p1": (torch.cat([probe.p1 for probe in probes]), selection.max_p1),
        "local divergence": (torch.cat([probe.local[kind] for probe in probes]), None),
        "global divergence": (torch.cat([probe.globally[kind] for probe in probes]), None),
        "weighted sum": (torch.cat([divergence(probe, recipe) for probe in probes]), selection.max_divergence),
    }
    figure, axes = _figure(14, 3.2, columns=4)
    for axis, (name, (measured, limit)) in zip(axes, values.items()):
        measured = measured.numpy()
        if name == "p1":
            axis.hist(measured, bins=40, range=(0, 1))
        else:
            measured = measured.clip(min=1e-12)
            low, high = np.log10(measured.min()), np.log10(measured.max())
            axis.hist(measured, bins=np.logspace(low - 0.05, high + 0.05, 40))
            axis.set_xscale("log")
        if limit is not None:
            axis.axvline(limit, color="black", linestyle="--")
        axis.set(title=name, ylabel="tokens")
    figure.savefig(path, dpi=110)


def _plot_clusters(path: Path, selection: Selection, recipe: Recipe) -> None:
    sizes = np.bincount(selection.candidate_clusters, minlength=len(selection.unique_images))
    order = np.argsort(-selection.unique_images, kind="stable")
    figure, axes = _figure(11, 3.4, columns=2)
    place = np.arange(len(order))
    axes[0].bar(place, sizes[order])
    axes[0].set(title="tokens a cluster", xlabel="cluster", ylabel="tokens")
    kept = selection.unique_images[order] > recipe.min_unique_images
    axes[1].bar(place, selection.unique_images[order], color=np.where(kept, "C0", "0.7"))
    axes[1].axhline(recipe.min_unique_images, color="black", linestyle="--")
    axes[1].set(title="distinct images a cluster (grey: dropped)", xlabel="cluster", ylabel="images")
    figure.savefig(path, dpi=110)


def _plot_candidates(path: Path, probes: list[Probe], selection: Selection, recipe: Recipe, most: int = 2000) -> bool:
    count = len(selection.candidates)
    if count < 5:
        return False
    from sklearn.manifold import TSNE

    shown = np.linspace(0, count - 1, min(count, most)).astype(int)
    points = torch.stack([probes[i].tokens[r] for i, r in selection.candidates[shown].tolist()]).float().numpy()
    perplexity = min(30.0, (len(shown) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="random", random_state=recipe.seed).fit_transform(points)
    clusters = selection.candidate_clusters[shown]
    kept = selection.unique_images[clusters] > recipe.min_unique_images
    figure, (axis,) = _figure(6, 5)
    axis.scatter(*places[~kept].T, s=8, color="0.8", label="dropped clusters")
    axis.scatter(*places[kept].T, s=10, c=clusters[kept], cmap="tab20", label="prototypes")
    axis.legend(loc="best")
    axis.set(xticks=[], yticks=[], title=f"{len(shown)} of {count} candidates")
    figure.savefig(path, dpi=110)
    return True
