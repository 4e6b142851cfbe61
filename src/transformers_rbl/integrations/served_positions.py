"""Positions `(t, h, w)` of a pruned prompt in an engine: a kept token keeps its own, text stands where the unpruned
prompt has it.

An engine asks for positions before an image is encoded, when it is known how many tokens stay and not which. Text and
the time of every kept token are known by then; how far row and column lie from that time travels with the encoded
token, as further channels, and is added when the language model runs. No engine is imported here. Positions:
Qwen2-VL, arXiv 2409.12191, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch


# Offsets travel in a token's own dtype, and bfloat16 counts exactly to 256 only: two digits of this base each.
BASE = 128
CHANNELS = 4


@dataclass(frozen=True)
class Run:
    """Placeholders that stand side by side: an image, a video, or one frame where text stands between frames.

    Args:
        start (`int`): the first one's place in the prompt.
        length (`int`): how many there are, each frame the same number.
        times (`list[int]`): time of each frame, counted from the run's first position.
        extent (`int`): positions that the unpruned run takes.
    """

    start: int
    length: int
    times: list[int]
    extent: int


def runs_of(start: int, is_visual: torch.Tensor, times: list[int], grid: tuple[int, int]) -> list[Run]:
    """The runs of one image or video.

    Args:
        start (`int`): where it begins in the prompt.
        is_visual (`torch.BoolTensor` of shape `(n,)`): its placeholders, among the text that stands between frames.
        times (`list[int]`): of each frame, from the first position of its run.
        grid (`tuple[int, int]`): rows and columns of visual tokens of a frame.
    """
    edges = torch.diff(is_visual.int(), prepend=torch.zeros(1, dtype=torch.int), append=torch.zeros(1, dtype=torch.int))
    first, last = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    frames = len(times) // len(first)
    parts = [times[frames * index : frames * (index + 1)] for index in range(len(first))]
    return [
        Run(start + begin, end - begin, part, max(part[-1] + 1, *grid)) for begin, end, part in zip(first, last, parts)
    ]


def known_positions(length: int, runs: Iterable[Run]) -> torch.Tensor:
    """`(3, length)` int64: positions of a prompt whose images are not encoded yet. Those of visual tokens are right in
    time alone; their [`offsets`] make them whole.

    Args:
        length (`int`): tokens of the pruned prompt.
        runs (`Iterable[Run]`): in the order of the prompt.
    """
    positions, place, cursor = torch.empty(length, dtype=torch.long), 0, 0
    for run in runs:
        text = run.start - place
        positions[place : run.start] = cursor + torch.arange(text)
        cursor += text
        place = run.start + run.length
        kept_per_frame = run.length // len(run.times)
        positions[run.start : place] = cursor + torch.tensor(run.times).repeat_interleave(kept_per_frame)
        cursor += run.extent
    positions[place:] = cursor + torch.arange(length - place)
    return positions.expand(3, -1).clone()


def offsets(times: list[int], grid: tuple[int, int]) -> torch.Tensor:
    """`(frames * rows * columns, 2)` int64: how far row and column of each unpruned token lie from its time."""
    axes = torch.meshgrid(torch.tensor(times), torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    time, row, column = (axis.flatten() for axis in axes)
    return torch.stack([row - time, column - time], dim=-1)


def attach(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Tokens `(k, d)` with their offsets `(k, 2)` as `CHANNELS` more channels."""
    digits = torch.cat([places // BASE, places % BASE], dim=-1)
    return torch.cat([tokens, digits.to(tokens)], dim=-1)


def detach(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`attach`] joined: tokens `(k, d)` and offsets `(k, 2)`."""
    tokens, digits = tokens[:, :-CHANNELS], tokens[:, -CHANNELS:].long()
    return tokens, digits[:, :2] * BASE + digits[:, 2:]
