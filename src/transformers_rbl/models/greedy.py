"""Greedy choices of tokens, one by one, each by what those before it leave: one loop, three objectives.

Everything is batched over images of one size, and no step waits for the device: a pick is an index that stays there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch


ROWS = 256  # of a cosine matrix that are computed at once
AHEAD = 48  # rows of it that are computed with one that is asked for
# What is left of a unit vector, squared, and a share of what is to be covered: below these it is float32's rounding.
DEPENDENT, COVERED = 1e-5, 2.5e-7


def over_images(scorer: Callable) -> Callable:
    """Mark a rule that takes several images of one size at once: every tensor with one more dimension in front."""
    scorer.over_images = True  # type: ignore[attr-defined]
    return scorer


def cosine_matrix(tokens: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs of tokens; one half is computed, the other is its mirror image.

    Args:
        tokens (`torch.Tensor` of shape `(images, L, d)`): float32.

    Returns:
        `torch.Tensor` of shape `(images, L, L)`. A zero token has cosine 0 with every token, itself included. Images
        are multiplied one by one, so that an image has the same cosines in any batch.
    """
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    length = unit.shape[1]
    cosines = unit.new_empty(len(unit), length, length)
    for image, matrix in zip(unit, cosines):
        for start in range(0, length, ROWS):
            end = min(length, start + ROWS)
            rows = image[start:end] @ image[start:].T
            matrix[start:end, start:] = rows
            matrix[end:, start:end] = rows[:, end - start :].T
    return cosines


def greedy_diversity(cosines: torch.Tensor, count: int) -> torch.Tensor:
    """Max-min diversity (DivPrune, arXiv 2503.02175, algorithm 1): first the token farthest from its nearest neighbour,
    then the one farthest from all those chosen.

    Args:
        cosines (`torch.Tensor` of shape `(images, L, L)`): see [`cosine_matrix`].
        count (`int`): how many are chosen.

    Returns:
        `torch.Tensor` of shape `(images, L)`: a token's largest cosine with the tokens chosen before it (-1 for the
        first), which never falls from one choice to the next; infinite for the others.
    """
    itself = torch.eye(cosines.shape[-1], dtype=torch.bool, device=cosines.device)
    neighbour = cosines.masked_fill(itself, -math.inf).amax(dim=-1)
    nearest: torch.Tensor | None = None

    def chosen(pick: torch.Tensor, step: int) -> torch.Tensor:
        nonlocal nearest
        row = _row(cosines, pick)
        nearest = row if nearest is None else torch.maximum(nearest, row)
        return nearest

    scores = _one_by_one(neighbour, chosen, count)
    first = neighbour.argmin(dim=-1, keepdim=True)
    return scores.scatter_(-1, first, -1.0) if count else scores


def greedy_dpp(tokens: torch.Tensor, quality: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy MAP of the determinantal point process of kernel q_i c_ij q_j: each time the token whose choice makes the
    determinant of the chosen ones' kernel largest, by updates of its Cholesky factor (Chen et al., "Fast greedy MAP
    inference for determinantal point process", NeurIPS 2018, algorithm 1): O(L) numbers for each token chosen before.

    The quality divides out of the factor: the gain of token i is q_i^2 r_i, with r_i the squared length of what is left
    of its unit vector once the span of the chosen ones is taken away.

    Args:
        tokens (`torch.Tensor` of shape `(images, L, d)`): float32.
        quality (`torch.Tensor` of shape `(images, L)`): in [0, 1].
        count (`int`): how many are chosen.

    Returns:
        `torch.Tensor` of shape `(images, L)`: minus the gain with which a token was chosen, which never falls from one
        choice to the next; infinite for the others. Tokens in the span of the chosen ones have no gain; they follow by
        quality, with score 1 - q_i^2.
    """
    images, length = quality.shape
    unit, worth = torch.nn.functional.normalize(tokens, dim=-1), quality.square()
    left, factor = unit.square().sum(dim=-1), unit.new_zeros(images, count, length)
    row_of = _rows_as_asked(unit) if _at_once(unit) else partial(_row, cosine_matrix(tokens))

    def scores() -> torch.Tensor:
        return torch.where(left > DEPENDENT, -worth * left, 1 - worth)

    gains = scores()

    def chosen(pick: torch.Tensor, step: int) -> torch.Tensor:
        nonlocal gains
        row, own = row_of(pick, gains), left.gather(1, pick)
        if step:
            before = factor[:, :step]
            weights = before.gather(2, pick[:, None].expand(-1, step, -1))
            row = torch.baddbmm(row[:, None], weights.transpose(1, 2), before, alpha=-1)[:, 0]
        row = row * torch.where(own > DEPENDENT, own.clamp_min(DEPENDENT).rsqrt(), 0.0)
        factor[:, step] = row
        left.sub_(row.square())
        gains = scores()
        return gains

    return _one_by_one(gains, chosen, count)


def greedy_coverage(cosines: torch.Tensor, demand: torch.Tensor, worth: torch.Tensor, count: int) -> torch.Tensor:
    """Facility location: each time the token of largest worth_i times gain_i, where the gain is what its choice adds to
    the coverage sum_k demand_k max(0, max_{chosen j} c_kj), as a share of the whole demand.

    Args:
        cosines (`torch.Tensor` of shape `(images, L, L)`): see [`cosine_matrix`].
        demand (`torch.Tensor` of shape `(images, L)`): how much it matters that a token is covered, from 0.
        worth (`torch.Tensor` of shape `(images, L)`): how much a token is wanted, in [0, 1].
        count (`int`): how many are chosen.

    Returns:
        `torch.Tensor` of shape `(images, L)`: minus worth times gain at a token's choice, which never falls from one
        choice to the next; infinite for the others. Tokens that add nothing follow by worth and demand, with score
        1 - worth_i times the token's share of the largest demand.
    """
    share = demand / demand.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rest = 1 - worth * demand / demand.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    covered = torch.zeros_like(share)
    gain = _gains(cosines, share, covered)
    at_once = _at_once(gain)
    gain = gain.double() if at_once else gain  # it is summed up over the choices

    def scores() -> torch.Tensor:
        return torch.where(gain > COVERED, -worth * gain, rest)

    def chosen(pick: torch.Tensor, step: int) -> torch.Tensor:
        nonlocal covered, gain
        now = torch.maximum(covered, _row(cosines, pick))
        if at_once:
            gain = gain - _gains_lost(cosines, share, covered, now)
        else:
            gain = _gains(cosines, share, now)
        covered = now
        return scores()

    return _one_by_one(scores(), chosen, count).float()


def _one_by_one(scores: torch.Tensor, chosen: Callable[[torch.Tensor, int], torch.Tensor], count: int) -> torch.Tensor:
    """Choose the token of lowest score, the first of several, `count` times.

    Args:
        scores (`torch.Tensor` of shape `(images, L)`): before anything is chosen.
        chosen (`Callable`): `(pick, step)` gives the scores once `pick` `(images, 1)` is chosen too.
        count (`int`): how many are chosen.

    Returns:
        `torch.Tensor` of shape `(images, L)`: the score with which a token was chosen, infinite for the others.
    """
    at_choice, taken = torch.full_like(scores, math.inf), torch.zeros_like(scores, dtype=torch.bool)
    for step in range(count):
        pick = scores.masked_fill(taken, math.inf).argmin(dim=-1, keepdim=True)
        at_choice.scatter_(-1, pick, scores.gather(-1, pick))
        taken.scatter_(-1, pick, True)
        if step + 1 < count:
            scores = chosen(pick, step)
    return at_choice


def _at_once(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at without a wait, so that only what is needed is computed: on a CPU."""
    return tensor.device.type == "cpu"


def _rows_as_asked(unit: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Where values can be looked at: rows of the cosine matrix, computed when they are asked for, with those of the
    tokens that are likely to be chosen next.

    Args:
        unit (`torch.Tensor` of shape `(images, L, d)`): tokens of unit length.

    Returns:
        `Callable`: `(pick, scores)` gives the row `(images, L)` of the tokens `pick` `(images, 1)`; those of lowest
        `scores` `(images, L)` are likely.
    """
    images, length = unit.shape[:2]
    rows, known = unit.new_empty(images, length, length), torch.zeros(images, length, dtype=torch.bool)

    def row_of(pick: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for image in (~known.gather(1, pick)[:, 0]).nonzero()[:, 0].tolist():
            likely = scores[image].masked_fill(known[image], math.inf).index_fill(0, pick[image], -math.inf)
            wanted = likely.topk(min(AHEAD, length), largest=False).indices
            rows[image, wanted] = unit[image, wanted] @ unit[image].T
            known[image, wanted] = True
        return _row(rows, pick)

    return row_of


def _row(cosines: torch.Tensor, pick: torch.Tensor, scores: torch.Tensor | None = None) -> torch.Tensor:
    """`(images, L)`: the cosines of the tokens `pick` `(images, 1)`."""
    return cosines.gather(1, pick[:, :, None].expand(-1, -1, cosines.shape[-1]))[:, 0]


def _gains(cosines: torch.Tensor, share: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """`(images, L)`: what each token would add to the coverage."""
    added = torch.maximum(cosines, covered[:, :, None]).sub_(covered[:, :, None])
    return torch.bmm(share[:, None], added)[:, 0]


def _gains_lost(cosines: torch.Tensor, share: torch.Tensor, covered: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """What the gains `(images, L)` lose as coverage rises from `covered` to `now` `(images, L)`: read off the tokens
    whose coverage rises, which are fewer and fewer."""
    lost = []
    for matrix, weights, low, high in zip(cosines, share, covered, now):
        rising = (high > low).nonzero()[:, 0]
        low, high = low[rising, None], high[rising, None]
        lost.append(weights[rising] @ matrix[rising].clamp_(low, high).sub_(low))
    return torch.stack(lost)
