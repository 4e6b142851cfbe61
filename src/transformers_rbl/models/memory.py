"""What a KV cache holds of pruned prompts. It travels on the cache, so that a model keeps no state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch


@dataclass
class CachedPrompt:
    """What a KV cache holds of pruned prompts; it travels on the cache itself, so that a model keeps no state.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, L)`, *optional*): original ids; None if they are not known.
        kept (`torch.BoolTensor` of shape `(batch, L)`): original positions that are in the cache.
        mask (`torch.BoolTensor` of shape `(batch, compact)`): cache entries that hold a token (the rest is padding).
        dropped (`torch.LongTensor` of shape `(batch,)`): visual tokens dropped, per row, behind which positions closed.
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
    def of(cache: Any) -> CachedPrompt | None:
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
                    "The rows of the cache were reordered or selected since their prompts were pruned. Continue "
                    "with all rows in their order (each may be repeated), or start with a new cache."
                )
        return memory

    def attach(self, cache: Any) -> None:
        """Keep this on the cache that it describes."""
        self.last_keys = self._keys_of(cache)
        cache.pruned_prompt = self

    def _keys_of(self, cache: Any) -> torch.Tensor | None:
        """`(rows, head_dim)`: what the last layer holds of the last entry; None where entries move or are encoded."""
        last = self.mask.shape[1] - 1
        # Layers of linear attention or convolution have no keys.
        layer = next((layer for layer in reversed(cache.layers) if getattr(layer, "keys", None) is not None), None)
        if layer is None or getattr(layer, "is_sliding", True) or layer.keys.ndim != 4:
            return None
        return layer.keys[:, 0, last].clone() if 0 <= last < layer.keys.shape[2] else None

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> CachedPrompt:
        """For a cache without pruned prompts: its entries are the original positions."""
        no_token = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(None, no_token, no_token, zeros, zeros)

    def repeat(self, times: int) -> CachedPrompt:
        """Each row `times` times, as `generate` expands a batch for several return sequences."""
        rows = {field.name: getattr(self, field.name) for field in fields(self)}
        repeated = {name: value.repeat_interleave(times, dim=0) for name, value in rows.items() if value is not None}
        return replace(self, **repeated)

    def original_length(self, cache_length: int) -> int:
        """Original positions that a cache of `cache_length` entries stands for: the prompt, then tokens decoded
        since."""
        if cache_length < self.mask.shape[1]:
            raise ValueError(
                f"The cache holds {cache_length} entries, fewer than the {self.mask.shape[1]} of the pruned prompt it "
                "belongs to: it was cropped. Crop no further than the prompt, or start with a new cache."
            )
        return self.kept.shape[1] + cache_length - self.mask.shape[1]

    def position_at(self, length: int, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`(batch,)`: the position after `length` original ones, tokens decoded since the pruned prompt counted."""
        known = self.kept.shape[1]
        if attention_mask is None:
            return self.next_position + length - known
        return self.next_position + attention_mask[:, known:length].to(torch.bool).sum(-1)

    def check(self, batch: int, input_ids: torch.Tensor | None = None) -> None:
        """Raise unless a continued call has the cached rows and, where ids are known, begins with the cached prompt."""
        if batch != len(self.kept):
            raise ValueError(f"The cache holds {len(self.kept)} pruned prompts, but the inputs have {batch} rows.")
        if input_ids is None or self.input_ids is None:
            return
        length = self.input_ids.shape[1]
        if not torch.equal(input_ids[:, :length].to(self.input_ids.device), self.input_ids):
            raise ValueError(
                "input_ids do not begin with the prompt that the cache was computed from. Continue with the "
                "full ids (the sequences that generate returned, plus the new turn), or start with a new cache."
            )


@dataclass
class Past:
    """What a call continues.

    Args:
        cache (`Cache`, *optional*): as given.
        memory ([`CachedPrompt`], *optional*): what it holds of pruned prompts.
        entries (`int`): its length.
        length (`int`): original positions that it stands for.
    """

    cache: Any
    memory: CachedPrompt | None
    entries: int
    length: int

    @classmethod
    def of(cls, cache: Any) -> Past:
        """Raises as [`CachedPrompt.of`] does, and for a cache that was cropped into the pruned prompt."""
        memory = CachedPrompt.of(cache)
        entries = 0 if cache is None else int(cache.get_seq_length())
        return cls(cache, memory, entries, entries if memory is None else memory.original_length(entries))


@contextmanager
def forgotten(past: Past) -> Iterator[None]:
    """While generation or a stock forward runs on compact prompts, its cache is an ordinary one."""
    if past.memory is not None:
        del past.cache.pruned_prompt
    try:
        yield
    finally:
        if past.memory is not None:
            past.cache.pruned_prompt = past.memory
