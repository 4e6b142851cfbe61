"""`tiles="where_needed"`: the thumbnail is encoded first, and a tile only where the thumbnail keeps a token.
`frames="where_needed"`: a video's frame is encoded only where its pixels are new."""

from __future__ import annotations

from dataclasses import replace

import torch

from .layout import ABSENT, PATCH, VisualLayout
from .pruning import PruningConfig


# Share of the thumbnail's tokens by which it is looked at, where the rule keeps fewer. Whether a region is empty is for
# the image to say and not for the budget, and what fills one patch of a tile is pale in a token that stands for more:
# by the rule's own 0.15 or 0.08, tiles were left out that hold what was asked for (docs/results/prefill.md).
LOOK = 0.4
# Mean change of a patch's normalised values (a quarter to a half of the range of pixels is 1) above which it is another
# one: 0.1 is 7 to 13 of 255 levels, above what noise and compression do to a patch, below what moves in it.
FRAME_CHANGE = 0.1


def looking(pruning: PruningConfig) -> PruningConfig:
    """The settings under which the thumbnail is looked at."""
    return replace(pruning, tiles="base", threshold=None, keep_ratio=max(LOOK, pruning.keep_ratio or 0.0))


def needed_tiles(base_kept: torch.Tensor, layout: VisualLayout, shares: torch.Tensor, count: int | None) -> list[bool]:
    """Which tiles of an image are encoded: the thumbnail, those on whose region of it a token stays, and then the first
    others, until there are as many tokens as are to stay.

    Args:
        base_kept (`torch.BoolTensor` of shape `(n,)`): tokens of the thumbnail that the rule keeps under the settings
            of [`looking`], on the CPU.
        layout ([`VisualLayout`]): of the image, with tiles.
        shares (`torch.Tensor` of shape `(L, tiles)`): how much of each visual token comes from each tile, the thumbnail
            first.
        count (`int`, *optional*): how many scored tokens stay; None under a threshold.
    """
    rows, columns = (place := layout.grids["tiles"]).shape
    kept = base_kept.view(layout.grids["base"].shape)
    needed = [True] + [False] * (shares.shape[1] - 1)
    for tile in range(1, shares.shape[1]):
        inside = shares[place, tile] > 0
        if not inside.any():
            continue
        region = [
            slice(int(where[0]) * cells // size, -(-(int(where[-1]) + 1) * cells // size))
            for where, cells, size in (
                (inside.any(1).nonzero()[:, 0], kept.shape[0], rows),
                (inside.any(0).nonzero()[:, 0], kept.shape[1], columns),
            )
        ]
        needed[tile] = bool(kept[region[0], region[1]].any())
    for tile in range(1, shares.shape[1]):
        if count is None or encoded_alone(layout, shares, needed).numbers_scored >= count:
            break
        needed[tile] = True
    return needed


def encoded_alone(layout: VisualLayout, shares: torch.Tensor, needed: list[bool]) -> VisualLayout:
    """The layout with those tokens ABSENT that come, wholly or in part, from tiles that are not encoded."""
    missing = shares[:, ~torch.tensor(needed)].sum(1) > 0
    kinds = torch.where(missing & (layout.kinds == PATCH), ABSENT, layout.kinds)
    return replace(layout, kinds=kinds, numbers=())


def rule_for(layout: VisualLayout, encoded: VisualLayout, pruning: PruningConfig) -> PruningConfig:
    """The settings under which the tokens that were encoded keep as many as all tokens would have kept, as far as there
    are so many and parts of one size can."""
    if pruning.keep_ratio is None:
        return pruning
    return replace(pruning, keep_ratio=min(1.0, layout.kept_scored_count(pruning) / encoded.numbers_scored))


def new_frames(frames: torch.Tensor) -> torch.Tensor:
    """Which frames of a video differ from the last one that did, in one of their patches at least: a change that is
    small in the frame counts, noise that is small everywhere does not, and what fades is new once it is far enough.

    Args:
        frames (`torch.Tensor` of shape `(frames, patches, values)`): normalised pixels.

    Returns:
        `torch.BoolTensor` of shape `(frames,)`, on their device; the first is new, and so is one with NaN.
    """
    last, new = frames[0].float(), [torch.ones((), dtype=torch.bool, device=frames.device)]
    for frame in frames[1:].float():
        new.append(~((frame - last).abs().mean(-1).amax() <= FRAME_CHANGE))
        last = torch.where(new[-1], frame, last)
    return torch.stack(new)


def in_patches(frames: torch.Tensor, side: int) -> torch.Tensor:
    """Frames `(frames, channels, height, width)` as `(frames, patches, values)` of whole patches."""
    cells = frames.unfold(2, side, side).unfold(3, side, side)
    return cells.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
