"""What the language model's answer says of a token: p1, and the divergence of two answers."""

from __future__ import annotations

import torch


def answer_confidence(logits: torch.Tensor, top_k: int = 50) -> torch.Tensor:
    """p1: the largest probability of a soft-max over the `top_k` highest logits (single-input experiment of
    arXiv 2503.20540). A low p1 says that the token, shown alone, names nothing.

    Args:
        logits (`torch.Tensor` of shape `(..., vocabulary)`): of the first answer token.

    Returns:
        `torch.FloatTensor` of shape `(...)`.
    """
    return logits.float().topk(min(top_k, logits.shape[-1]), dim=-1).values.softmax(dim=-1).amax(dim=-1)


def answer_divergence(
    logits: torch.Tensor, changed: torch.Tensor, top_k: int = 10, kind: str = "upstream"
) -> torch.Tensor:
    """How much an answer changes, over the `top_k` highest entries of `logits`.

    With P and Q the soft-max of these entries of `logits` and `changed`, and M = (P + Q) / 2:
    `"upstream"` is D = 1/2 [mean_k M log(M/P) + mean_k M log(M/Q)], the quantity that upstream's code computes
    (`DingchenYang99/RedundancyCodebook`): KL(M||.) and not KL(.||M), and a mean over the entries;
    `"jensen_shannon"` is the standard JS = 1/2 [sum_k P log(P/M) + sum_k Q log(Q/M)], in nats.

    Args:
        logits (`torch.Tensor` of shape `(..., vocabulary)`): of the first answer token, with the token in place.
        changed (`torch.Tensor` of the same shape): without it.

    Returns:
        `torch.FloatTensor` of shape `(...)`.
    """
    best = logits.float().topk(min(top_k, logits.shape[-1]), dim=-1)
    p = best.values.log_softmax(dim=-1)
    q = changed.float().gather(-1, best.indices).log_softmax(dim=-1)
    m = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    if kind == "upstream":
        return 0.5 * ((m.exp() * (m - p)).mean(-1) + (m.exp() * (m - q)).mean(-1))
    if kind == "jensen_shannon":
        return 0.5 * ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1))
    raise ValueError(f"kind must be upstream or jensen_shannon, got {kind!r}.")


def neighbourhoods(positions: torch.Tensor, grid: int | tuple[int, int]) -> torch.Tensor:
    """The 3x3 neighbourhood of each position in a grid, shifted inwards at the border.

    Args:
        positions (`torch.LongTensor` of shape `(T,)`): in raster order.
        grid (`int` or `tuple[int, int]`): rows and columns; a number is both.

    Returns:
        `torch.LongTensor` of shape `(T, 9)`: positions in raster order, fewer where the grid is smaller than 3x3.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    height, width = min(3, rows), min(3, columns)
    top = (positions // columns - 1).clamp(0, rows - height)
    left = (positions % columns - 1).clamp(0, columns - width)
    down, across = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
    return (down[:, :, None] * columns + across[:, None, :]).flatten(1)
