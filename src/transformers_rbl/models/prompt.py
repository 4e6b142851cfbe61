"""Drop pruned placeholders from everything aligned with the prompt, remember what a cache holds, and put it all
back."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate

import torch


@dataclass
class CachedPrompt:
    """What a KV cache holds of pruned prompts; it travels on the cache itself, so that a model keeps no state.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, L)`, *optional*): original ids; None if they are not known.
        kept (`torch.BoolTensor` of shape `(batch, L)`): original positions that are in the cache.
        mask (`torch.BoolTensor` of shape `(batch, compact)`): cache entries that hold a token (the rest is padding).
        dropped (`torch.LongTensor` of shape `(batch,)`): visual tokens dropped, per row.
        next_position (`torch.LongTensor` of shape `(batch,)`): position of the token after the last entry.
        last_keys (`torch.Tensor` of shape `(batch, head_dim)`, *optional*): of the last entry, to know rows again.
    """

    input_ids: torch.Tensor | None
    kept: torch.Tensor
    mask: torch.Tensor
    dropped: torch.Tensor
    next_position: torch.Tensor
    last_keys: torch.Tensor | None = None

    @staticmethod
    def of(cache) -> CachedPrompt | None:
        """What is known of a cache; None for one without pruned prompts, or reset to be used again.

        Raises:
            ValueError: if the cache's rows are no longer those of the prompts, or each of them several times.
        """
        memory = getattr(cache, "pruned_prompt", None)
        if memory is None:
            return None
        if int(cache.get_seq_length()) == 0:
            del cache.pruned_prompt  # it must not come back to life once the cache fills again
            return None
        if memory.last_keys is not None and (now := memory._keys_of(cache)) is not None:
            times = max(1, len(now) // len(memory.last_keys))
            if not torch.equal(now, memory.last_keys.to(now.device).repeat_interleave(times, dim=0)):
                raise ValueError(
                    "The rows of past_key_values were reordered or selected since their prompts were pruned. Continue "
                    "with all rows in their order (each may be repeated), or start with a new cache."
                )
        return memory

    def attach(self, cache) -> None:
        """Keep this on the cache that it describes."""
        self.last_keys = self._keys_of(cache)
        cache.pruned_prompt = self

    def _keys_of(self, cache) -> torch.Tensor | None:
        """`(rows, head_dim)`: what the last layer holds of the last entry; None where entries move or are encoded."""
        layer, last = cache.layers[-1], self.mask.shape[1] - 1
        keys = getattr(layer, "keys", None)
        if layer.is_sliding or keys is None or keys.ndim != 4 or not 0 <= last < keys.shape[2]:
            return None
        return keys[:, 0, last].clone()

    @classmethod
    def empty(cls, batch: int, device) -> CachedPrompt:
        """For a cache without pruned prompts: its entries are the original positions."""
        no_token = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(None, no_token, no_token, zeros, zeros)

    def repeat(self, times: int) -> CachedPrompt:
        """Each row `times` times, as `generate` expands a batch for several return sequences."""
        values = [getattr(self, field.name) for field in fields(self)]
        return CachedPrompt(*(value if value is None else value.repeat_interleave(times, dim=0) for value in values))

    def original_length(self, cache_length: int) -> int:
        """Original positions that a cache of `cache_length` entries stands for: the prompt, then tokens decoded
        since."""
        if cache_length < self.mask.shape[1]:
            raise ValueError(
                f"The cache holds {cache_length} entries, fewer than the {self.mask.shape[1]} of the pruned prompt it "
                "belongs to: it was cropped. Crop no further than the prompt, or start with a new cache."
            )
        return self.kept.shape[1] + cache_length - self.mask.shape[1]

    def check(self, batch: int, input_ids: torch.Tensor | None = None) -> None:
        """Raise unless a continued call has the cached rows and, where ids are known, begins with the cached prompt."""
        if batch != len(self.kept):
            raise ValueError(f"The cache holds {len(self.kept)} pruned prompts, but the inputs have {batch} rows.")
        if input_ids is None or self.input_ids is None:
            return
        length = self.input_ids.shape[1]
        if not torch.equal(input_ids[:, :length].to(self.input_ids.device), self.input_ids):
            raise ValueError(
                "input_ids do not begin with the prompt that past_key_values was computed from. Continue with the "
                "full ids (the sequences that generate returned, plus the new turn), or start with a new cache."
            )


class PromptPlan:
    """Where the tokens of a prompt go once dropped and padded positions have left it.

    Args:
        dropped (`torch.BoolTensor` of shape `(batch, n)`): visual tokens that leave the prompt (its part beyond the
            cache).
        attention_mask (`torch.Tensor` of shape `(batch, start + n)`, *optional*): the original mask, cached part
            included. Padding leaves the prompt too, and returns as far as rows of different length need it.
        start (`int`, defaults to 0): original positions that the cache stands for.
        memory ([`CachedPrompt`], *optional*): what is known of them.

    Attributes:
        kept (`torch.BoolTensor` of shape `(batch, n)`): attended and not dropped.
        index (`torch.LongTensor` of shape `(batch, compact)`): original position of each compact entry (0 at padding).
        mask (`torch.BoolTensor` of shape `(batch, compact)`): True where there is a token, False at padding.
        attention_mask (`torch.BoolTensor` of shape `(batch, cached + compact)`): the mask that goes with the compact
            prompt.

    Raises:
        ValueError: if `attention_mask` has another shape.
    """

    def __init__(self, dropped, attention_mask=None, start: int = 0, memory: CachedPrompt | None = None):
        batch, length = dropped.shape
        self.past = memory or CachedPrompt.empty(batch, dropped.device)
        if attention_mask is None:
            attended = torch.ones(batch, start + length, dtype=torch.bool, device=dropped.device)
        elif attention_mask.shape == (batch, start + length):
            attended = attention_mask.to(dropped.device).bool()
        else:
            raise ValueError(
                f"Pruning needs an attention_mask of shape {(batch, start + length)}, (batch, original length); "
                f"got {tuple(attention_mask.shape)}."
            )
        known = self.past.kept.shape[1]
        self.decoded = attended[:, known:start]
        self.kept, self.dropped = attended[:, start:] & ~dropped, attended[:, start:] & dropped
        right_padded = start == 0 and length > 0 and bool(attended[:, 0].all() and not attended[:, -1].all())
        self.index, self.mask = _compact_index(self.kept, right_padded)
        self.attention_mask = torch.cat([self.past.mask, self.decoded, self.mask], dim=1)

    def take(self, tensor: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """`tensor` of shape `(batch, n, ...)` at the kept positions: `(batch, compact, ...)`, `fill` at padding."""
        shape = self.index.shape + (1,) * (tensor.ndim - 2)
        taken = tensor.gather(1, self.index.view(shape).expand(-1, -1, *tensor.shape[2:]))
        return taken.masked_fill(~self.mask.view(shape), fill)

    def positions(self, position_ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """Positions `(batch, compact)` without gaps.

        Args:
            position_ids (`torch.LongTensor` of shape `(batch or 1, n)`, *optional*): original positions. Where they
                restart (packed sequences), the gaps of that sequence alone are closed. Without them, the cache's
                positions go on; None is returned where there is no cache, since a language model then counts by itself.
        """
        if position_ids is None:
            if self.index.numel() == 0 or self.attention_mask.shape[1] == self.mask.shape[1]:
                return None
            first = self.past.next_position + self.decoded.sum(-1)
            return (first[:, None] + self.mask.long().cumsum(-1) - 1).clamp(min=0)
        position_ids = position_ids.expand(len(self.index), -1)
        starts = torch.ones_like(self.kept)
        starts[:, 1:] = (position_ids[:, 1:] <= position_ids[:, :-1]) | ~(self.kept | self.dropped)[:, :-1]
        dropped_before = self.dropped.long().cumsum(-1) - self.dropped.long()
        # Never decreasing along a row, so the running maximum over starts is the value at the latest start.
        at_start = dropped_before.masked_fill(~starts, 0).cummax(-1).values
        return self.take(position_ids - (dropped_before - at_start) - self.past.dropped[:, None])

    def remember(self, input_ids: torch.Tensor | None, position_ids: torch.Tensor | None) -> CachedPrompt:
        """What the cache will hold: `input_ids` `(batch, start + n)` as far as known, compact `position_ids` if
        given."""
        if position_ids is None:
            upcoming = torch.full_like(self.past.next_position, self.attention_mask.shape[1])
        else:
            upcoming = position_ids.masked_fill(~self.mask, -1).amax(-1) + 1
        return CachedPrompt(
            input_ids=input_ids,
            kept=torch.cat([self.past.kept, self.decoded, self.kept], dim=1),
            mask=self.attention_mask,
            dropped=self.past.dropped + self.dropped.sum(-1),
            next_position=upcoming,
        )


def scatter_to_prompt(
    values: torch.Tensor, prompt_mask: torch.Tensor, padding_side: str | None = None, fill: float | str = 0
) -> torch.Tensor:
    """Put `forward`'s compact outputs (logits, hidden states) back at the length of the original prompt.

    Args:
        values (`torch.Tensor` of shape `(batch, compact, ...)`): e.g. `outputs.logits`.
        prompt_mask (`torch.BoolTensor` of shape `(batch, L)`): `outputs.prompt_mask`, the positions that `values`
            covers.
        padding_side (`str`, *optional*): side on which `values` are padded; needed only if rows kept different counts.
            `"right"` if the prompt was right-padded, that is if some row of it did end in padding; else `"left"`.
        fill (`float` or `"previous"`, defaults to 0): what the other positions get. `"previous"` repeats the value of
            the last kept position before them, which keeps next-token logits right for labels shifted by one.

    Returns:
        `torch.Tensor` of shape `(batch, L, ...)`.

    Raises:
        ValueError: if the lengths do not fit, or rows are ragged and `padding_side` is not given.
    """
    counts = prompt_mask.sum(-1)
    if len(values) != len(prompt_mask) or values.shape[1] != int(counts.max()):
        raise ValueError(
            f"values of shape {tuple(values.shape)} do not cover a prompt_mask with up to {int(counts.max())} kept "
            f"positions in {len(prompt_mask)} rows (logits_to_keep returns fewer logits)."
        )
    if padding_side not in ("left", "right") and bool((counts != counts.max()).any()):
        raise ValueError(
            "Rows kept different counts: say on which side the batch is padded, padding_side='left' or 'right'."
        )
    rank = prompt_mask.long().cumsum(-1) - 1
    covered = rank >= 0 if fill == "previous" else prompt_mask
    if padding_side != "right":
        rank = rank + (values.shape[1] - counts)[:, None]
    shape = rank.shape + (1,) * (values.ndim - 2)
    scattered = values.gather(1, rank.clamp(min=0).view(shape).expand(-1, -1, *values.shape[2:]))
    return scattered.masked_fill(~covered.view(shape), 0 if fill == "previous" else fill)


def check_placeholders(slots: torch.Tensor, counts: list[int], modality: str = "image") -> None:
    """Raise unless the placeholders `slots` `(batch, L)` bool have room for visual inputs of `counts` tokens, none
    split."""
    per_row = slots.sum(-1).tolist()
    if sum(per_row) != sum(counts):
        raise ValueError(
            f"The prompt has {sum(per_row)} {modality} placeholders, but its {len(counts)} {modality}(s) have "
            f"{sum(counts)} visual tokens: use the checkpoint's own processor, and as many images as placeholders."
        )
    ends = set(accumulate(counts, initial=0))
    for row, end in enumerate(accumulate(per_row)):
        if end not in ends:
            raise ValueError(
                f"The {modality} placeholders of prompt {row} end in the middle of a {modality}: prompts and "
                f"{modality}s are not in the same order."
            )


def _compact_index(kept: torch.Tensor, right_padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    counts = kept.sum(-1, keepdim=True)
    length = int(counts.max()) if kept.numel() else 0
    front = (~kept).long().argsort(dim=-1, stable=True)  # kept positions first, in order
    place = torch.arange(length, device=kept.device).expand(len(kept), -1)
    if not right_padded:
        place = place - (length - counts)
    mask = (place >= 0) & (place < counts)
    return front.gather(1, place.clamp(0, max(kept.shape[1] - 1, 0))).masked_fill(~mask, 0), mask
