"""Pictures of what was kept: the photo with dropped patches dimmed, tiles mapped back to where they lie in the
image."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..models.layout import NEWLINE, PATCH, VisualLayout
from .metrics import bootstrap_interval
from .results import RuleResult, unpruned


def kept_grids(keep_mask: torch.Tensor, kinds: torch.Tensor | VisualLayout) -> dict[str, np.ndarray]:
    """One image's kept tokens as grids over the image.

    Args:
        keep_mask (`torch.BoolTensor` of shape `(L,)`): an entry of `outputs.keep_masks`.
        kinds (`torch.LongTensor` of shape `(L,)` or [`VisualLayout`]): what each token is, from the headless model's
            `token_kinds` where images without tiles are square, or where each lies, from its `layouts`.

    Returns:
        `dict[str, np.ndarray]`: `"base"`, the base image's grid, and `"tiles"`, the grid of all tiles with their
        padding gone, each `(rows, columns)` bool, where the image has them. Both cover the whole image.

    Raises:
        ValueError: if mask and layout are not of one length.
    """
    layout = kinds if isinstance(kinds, VisualLayout) else VisualLayout(kinds)
    if len(keep_mask) != len(layout):
        raise ValueError(f"A mask of {len(keep_mask)} tokens is not of an image of {len(layout)}.")
    keep_mask = keep_mask.cpu()
    return {name: keep_mask[places].numpy() for name, places in layout.grids.items()}


def dim_dropped(image: Image.Image, grid: np.ndarray, brightness: float = 0.25) -> Image.Image:
    """`image` with the cells of `grid` `(rows, columns)` that are False dimmed to `brightness`."""
    mask = Image.fromarray(grid.astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    dark = Image.blend(Image.new("RGB", image.size), image.convert("RGB"), brightness)
    return Image.composite(image.convert("RGB"), dark, mask)


def plot_kept(
    images: Sequence[Image.Image],
    keep_masks: Sequence[torch.Tensor],
    kinds: Sequence[torch.Tensor | VisualLayout],
    path: str | os.PathLike[str],
    titles: Sequence[str] | None = None,
) -> None:
    """Write one row a photo: as it is, base image, tiles.

    Args:
        images (`Sequence[PIL.Image.Image]`), keep_masks (`Sequence[torch.BoolTensor]`), kinds
            (`Sequence[torch.LongTensor | VisualLayout]`): per image, see [`kept_grids`].
        path (`str` or `os.PathLike`): the picture to write; its suffix gives the format.
        titles (`Sequence[str]`, *optional*): per image.

    Raises:
        ValueError: if there are no images.
    """
    _check_any(images, "images")
    from matplotlib.figure import Figure

    every = [kept_grids(mask, kind) for mask, kind in zip(keep_masks, kinds, strict=True)]
    views = [name for name in ("base", "tiles") if any(name in grids for grids in every)]
    figure = Figure(figsize=(4 * (1 + len(views)), 3.2 * len(images)), layout="constrained")
    axes = figure.subplots(len(images), 1 + len(views), squeeze=False)
    for row, (image, grids) in enumerate(zip(images, every, strict=True)):
        axes[row, 0].imshow(image)
        axes[row, 0].set_title(titles[row] if titles else "photo")
        for axis, name in zip(axes[row, 1:], views):
            if name in grids:
                grid = grids[name]
                axis.imshow(dim_dropped(image, grid))
                label = "base image" if name == "base" else "tiles"
                axis.set_title(f"{label}: {int(grid.sum())} of {grid.size} tokens kept ({grid.mean():.0%})")
        for axis in axes[row]:
            axis.axis("off")
    figure.savefig(path, dpi=110)


def plot_retentions(
    images: Sequence[Image.Image],
    keep_masks: Sequence[Sequence[torch.Tensor]],
    kinds: Sequence[torch.Tensor | VisualLayout],
    labels: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """Write one row a photo: as it is, then what each setting keeps of it (of its tiles, where it has them).

    Args:
        images (`Sequence[PIL.Image.Image]`), kinds (`Sequence[torch.LongTensor | VisualLayout]`): per image, see
            [`kept_grids`].
        keep_masks (`Sequence[Sequence[torch.BoolTensor]]`): per setting, per image.
        labels (`Sequence[str]`): per setting.
        path (`str` or `os.PathLike`): the picture to write.

    Raises:
        ValueError: if there are no images.
    """
    _check_any(images, "images")
    rows = []
    for number, image in enumerate(images):
        row = [("photo", image)]
        for label, masks in zip(labels, keep_masks, strict=True):
            grids = kept_grids(masks[number], kinds[number])
            grid = grids.get("tiles", grids["base"])
            row.append((f"{label}: {int(grid.sum())} of {grid.size}", dim_dropped(image, grid)))
        rows.append(row)
    _write_pictures(rows, path)


def plot_frames(
    frames: Sequence[Image.Image],
    keep_masks: Sequence[torch.Tensor],
    labels: Sequence[str],
    path: str | os.PathLike[str],
    layout: VisualLayout | None = None,
) -> None:
    """Write a video's frames, and below them what each setting keeps of each.

    Args:
        frames (`Sequence[PIL.Image.Image]`): of one video.
        keep_masks (`Sequence[torch.BoolTensor]`): per setting, its `(L,)` entry of `outputs.video_keep_masks`.
        labels (`Sequence[str]`): per setting.
        path (`str` or `os.PathLike`): the picture to write.
        layout ([`VisualLayout`], *optional*): of the video; frames that share a temporal patch share its tokens. By
            default a square grid a frame, and one row end after all.

    Raises:
        ValueError: if there are no frames, or a mask is not of so many frames.
    """
    _check_any(frames, "frames")
    rows = [[(f"frame {number + 1}", frame) for number, frame in enumerate(frames)]]
    for label, mask in zip(labels, keep_masks, strict=True):
        grids = _frame_grids(mask, len(frames), layout)
        rows.append(
            [(f"{label}: {grid.sum()} of {grid.size}", dim_dropped(frame, grid)) for frame, grid in zip(frames, grids)]
        )
    _write_pictures(rows, path)


def _frame_grids(mask: torch.Tensor, frames: int, layout: VisualLayout | None) -> list[np.ndarray]:
    """What a mask keeps of each frame, `(rows, columns)` bool."""
    if layout is None:
        side = round(((len(mask) - 1) / frames) ** 0.5)
        if len(mask) != frames * side**2 + 1:
            raise ValueError(f"A mask of {len(mask)} tokens is not of {frames} frames of square grids.")
        layout = VisualLayout(torch.tensor([PATCH] * (len(mask) - 1) + [NEWLINE]), frames)
    if frames % layout.frames:
        raise ValueError(f"{frames} frames cannot share the {layout.frames} temporal patches of this layout.")
    parts = np.split(kept_grids(mask, layout)["base"], layout.frames)
    return [parts[number * layout.frames // frames] for number in range(frames)]


def _check_any(images: Sequence[Image.Image], what: str) -> None:
    if not images:
        raise ValueError(f"There are no {what} to draw.")


def _write_pictures(rows: list[list[tuple[str, Image.Image]]], path: str | os.PathLike[str]) -> None:
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    figure = Figure(figsize=(2.4 * columns, 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis in axes.flatten():
        axis.axis("off")
    for line, row in zip(axes, rows):
        for axis, (title, picture) in zip(line, row):
            axis.imshow(picture)
            axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=100)


def plot_accuracy(results: Sequence[RuleResult], path: str | os.PathLike[str], metric: str | None = None) -> None:
    """Write accuracy against retention: a line a score (and a way of merging), with 95% intervals, and the unpruned
    model as a dashed line.

    Args:
        results (`Sequence[RuleResult]`): of [`evaluate`], the unpruned model first.
        path (`str` or `os.PathLike`): the picture to write.
        metric (`str`, *optional*): default the first one.

    Raises:
        ValueError: if there are no results.
    """
    base = unpruned(results).correct
    from matplotlib.figure import Figure

    metric = metric or next(iter(base))
    lines: dict[str, list[RuleResult]] = {}
    for result in results[1:]:
        kind = "keep_ratio" if result.pruning["threshold"] is None else "threshold"
        merge = result.pruning.get("merge", "none")  # files of before there was merging have no such setting
        label = result.pruning["score"] + ("" if merge == "none" else f", merge {merge}")
        label += "" if kind == "keep_ratio" else ", threshold"
        lines.setdefault(label, []).append(result)
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(float(np.mean(base[metric])), color="black", linestyle="--", label="unpruned")
    for label, rules in lines.items():
        rules.sort(key=lambda result: result.retention)
        share, mean = [rule.retention for rule in rules], [np.mean(rule.correct[metric]) for rule in rules]
        spread = np.array([bootstrap_interval(np.array(rule.correct[metric])) for rule in rules]).T
        axis.errorbar(share, mean, yerr=np.abs(spread - mean), marker="o", capsize=3, label=label)
    axis.set(
        xlabel="retention (share of visual tokens kept, row ends aside)", ylabel=f"accuracy ({metric})", ylim=(0, 1.02)
    )
    axis.legend()
    figure.savefig(path, dpi=110)
