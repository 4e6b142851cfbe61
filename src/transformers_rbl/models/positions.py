"""Positions of a compact prompt: 1-D ones close up, or stay with gaps; those of images with m-RoPE always stay."""

from __future__ import annotations

import torch

from .prompt import PromptPlan


def compact_positions(plan: PromptPlan, position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Positions of the tokens that stay.

    Args:
        plan ([`PromptPlan`]): which ones. Where it `keeps_positions`, 1-D ones are those of the unpruned prompt.
        position_ids (`torch.LongTensor` of shape `(batch or 1, n)` or `(3 or 4, batch, n)`, *optional*): original ones.
            1-D: gaps are closed, as upstream does; where positions restart (packed sequences), those of that sequence
            alone. m-RoPE `(t, h, w)`: a kept token stays where it lies in its image, and text where the unpruned prompt
            has it, so that there is no gap to close.

    Returns:
        Positions `(batch, compact)` or `(3 or 4, batch, compact)`. Without `position_ids` the cache's go on; None where
        there is no cache, since a language model then counts by itself.
    """
    if position_ids is None:
        first = plan.past.next_position + plan.decoded.sum(-1)
        if plan.keeps_positions:
            return plan.take(first[:, None] + (plan.kept | plan.dropped).long().cumsum(-1) - 1)
        if plan.index.numel() == 0 or plan.attention_mask.shape[1] == plan.mask.shape[1]:
            return None
        return (first[:, None] + plan.mask.long().cumsum(-1) - 1).clamp(min=0)
    rows = len(plan.index)
    if position_ids.ndim == 3:
        taken = torch.stack([plan.take(axis.expand(rows, -1)) for axis in position_ids])
        if len(taken) == 4:  # the first row numbers tokens for the causal mask: gaps would mean packed sequences
            taken[0] = (plan.attention_mask.long().cumsum(-1) - 1)[:, -plan.mask.shape[1] :].clamp(min=0)
        return taken
    position_ids = position_ids.expand(rows, -1) - plan.past.dropped[:, None]
    if plan.keeps_positions:
        return plan.take(position_ids)
    starts = torch.ones_like(plan.kept)
    starts[:, 1:] = (position_ids[:, 1:] <= position_ids[:, :-1]) | ~(plan.kept | plan.dropped)[:, :-1]
    dropped_before = plan.dropped.long().cumsum(-1) - plan.dropped.long()
    # Never decreasing along a row, so the running maximum over starts is the value at the latest start.
    at_start = dropped_before.masked_fill(~starts, 0).cummax(-1).values
    return plan.take(position_ids - (dropped_before - at_start))


def next_position(plan: PromptPlan, position_ids: torch.Tensor | None) -> torch.Tensor:
    """`(batch,)`: the position after the last entry, given the compact `position_ids`. As stock goes on: from the last
    token, behind which a video's time may lie."""
    if position_ids is None:
        return torch.full_like(plan.past.next_position, plan.attention_mask.shape[1])
    axes = position_ids[-3:] if position_ids.ndim == 3 else position_ids[None]
    last = (plan.mask.long() * torch.arange(1, plan.mask.shape[1] + 1, device=plan.mask.device)).argmax(-1)
    after = axes.amax(0).gather(1, last[:, None])[:, 0] + 1
    return torch.where(plan.mask.any(-1), after, 0)
