"""Drop pruned placeholders from everything aligned with the prompt, and put it all back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layout import on_device
from .memory import CachedPrompt


class PromptReading:
    """What the host has to know of a prompt, read from the device in one transfer, before anything is encoded.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch, cached + new)`, *optional*).
        shape (`Sequence[int]`): `(batch, L)` of the prompt, whole or what is new of it.
        slots (`dict[str, torch.BoolTensor]`): by modality `(batch, L)`, where the prompt waits for visual tokens.
        start (`int`): original positions that a cache stands for.
        seen (`int`): leading columns of the prompt that are among those.

    Attributes:
        columns (`dict[str, list[list[int]]]`): by modality and row, where the placeholders are.
        attended (`list[int]`): attended positions beyond the cache, per row.
        hidden (`bool`): whether the mask hides placeholders there.
        right_padded (`bool`): whether the prompt is padded on its right.

    Raises:
        ValueError: if `attention_mask` has another shape.
    """

    def __init__(
        self,
        attention_mask: torch.Tensor | None,
        shape: Sequence[int],
        slots: dict[str, torch.Tensor] | None = None,
        start: int = 0,
        seen: int = 0,
    ):
        (batch, length), slots = shape, slots or {}
        if attention_mask is not None and attention_mask.shape != (batch, start + length - seen):
            raise ValueError(
                f"Pruning needs an attention_mask of shape {(batch, start + length - seen)}, (batch, original length); "
                f"got {tuple(attention_mask.shape)}."
            )
        mask = [] if attention_mask is None else [attention_mask[:, -length:].bool()]
        views = [*slots.values(), *mask]
        on_host = torch.stack([view.to(views[0].device) for view in views]).cpu() if views else None
        attended = torch.ones(shape, dtype=torch.bool) if on_host is None or not mask else on_host[-1]
        by_modality = {} if on_host is None else dict(zip(slots, on_host))
        self.seen = seen
        self.columns = {name: [row.nonzero()[:, 0].tolist() for row in rows] for name, rows in by_modality.items()}
        self.attended: list[int] = attended[:, seen:].sum(-1).tolist()
        self.hidden = any(bool((rows & ~attended)[:, seen:].any()) for rows in by_modality.values())
        self.right_padded = start == 0 and length > 0 and bool(attended[:, 0].all() and not attended[:, -1].all())

    def all_columns(self, modality: str) -> list[int]:
        """Columns of the placeholders of all rows, in order."""
        return [column for row in self.columns[modality] for column in row]

    def counts(self, modality: str) -> list[int]:
        """Placeholders beyond the cache, per row."""
        return [sum(column >= self.seen for column in row) for row in self.columns[modality]]

    def runs(self, modality: str, apart: int = 0) -> list[list[int]]:
        """Lengths of the runs of placeholders, of the whole prompt and of what a cache does not hold of it. A run goes
        on behind `apart` other tokens."""
        rows = self.columns[modality]
        new = [[column for column in row if column >= self.seen] for row in rows]
        return [run_lengths(rows, apart), run_lengths(new, apart)]


class PromptPlan:
    """Where the tokens of a prompt go once dropped and padded positions have left it.

    Args:
        dropped (`torch.BoolTensor` of shape `(batch, n)`): visual tokens that leave the prompt (its part beyond the
            cache).
        attention_mask (`torch.Tensor` of shape `(batch, start + n)`, *optional*): the original mask, cached part
            included. Padding leaves the prompt too, and returns as far as rows of different length need it.
        start (`int`, defaults to 0): original positions that the cache stands for.
        memory ([`CachedPrompt`], *optional*): what is known of them.
        reading ([`PromptReading`], *optional*): what the host has read of the prompt.
        lost (`list[int]`, *optional*): attended visual tokens that leave each row. With `reading` this tells all that
            the host needs, and the device is asked for nothing.
        keeps_positions (`bool`): positions do not close up where tokens leave.

    Attributes:
        kept (`torch.BoolTensor` of shape `(batch, n)`): attended and not dropped.
        index (`torch.LongTensor` of shape `(batch, compact)`): original position of each compact entry (0 at padding).
        mask (`torch.BoolTensor` of shape `(batch, compact)`): True where there is a token, False at padding.
        attention_mask (`torch.BoolTensor` of shape `(batch, cached + compact)`): the mask that goes with the compact
            prompt.
        keeps_all (`bool`): nothing leaves the prompt.
        is_full (`bool`): the compact prompt, which continues no cache, has no padding.

    Raises:
        ValueError: if `attention_mask` has another shape.
    """

    def __init__(
        self,
        dropped: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        start: int = 0,
        memory: CachedPrompt | None = None,
        reading: PromptReading | None = None,
        lost: list[int] | None = None,
        keeps_positions: bool = False,
    ):
        batch, length = dropped.shape
        reading = reading or PromptReading(attention_mask, (batch, length), start=start)
        self.keeps_positions = keeps_positions
        self.past = memory or CachedPrompt.empty(batch, dropped.device)
        if attention_mask is None:
            attended = torch.ones(batch, start + length, dtype=torch.bool, device=dropped.device)
        else:
            attended = on_device(attention_mask, dropped).bool()
        known = self.past.kept.shape[1]
        self.decoded = attended[:, known:start]
        self.kept, self.dropped = attended[:, start:] & ~dropped, attended[:, start:] & dropped
        counts = self.kept.sum(-1)
        rows = counts.tolist() if lost is None else [n - gone for n, gone in zip(reading.attended, lost)]
        self.keeps_all = rows == [length] * batch
        self.is_full = start == 0 and len(set(rows)) <= 1
        self.index, self.mask = _compact_index(self.kept, counts, max(rows, default=0), reading.right_padded)
        self.attention_mask = torch.cat([self.past.mask, self.decoded, self.mask], dim=1)

    def take(self, tensor: torch.Tensor, fill: float = 0) -> torch.Tensor:
        """`tensor` of shape `(batch, n, ...)` at the kept positions: `(batch, compact, ...)`, `fill` at padding."""
        shape = self.index.shape + (1,) * (tensor.ndim - 2)
        taken = tensor.gather(1, self.index.view(shape).expand(-1, -1, *tensor.shape[2:]))
        return taken.masked_fill(~self.mask.view(shape), fill)

    def remember(self, input_ids: torch.Tensor | None, next_position: torch.Tensor) -> CachedPrompt:
        """What the cache will hold.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, start + n)`, *optional*): original ids, if known.
            next_position (`torch.LongTensor` of shape `(batch,)`): of the token after the last entry.
        """
        return CachedPrompt(
            input_ids=input_ids,
            kept=torch.cat([self.past.kept, self.decoded, self.kept], dim=1),
            mask=self.attention_mask,
            dropped=self.past.dropped + (0 if self.keeps_positions else self.dropped.sum(-1)),
            next_position=next_position,
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
    return scattered.masked_fill(~covered.view(shape), 0 if isinstance(fill, str) else fill)


def check_placeholders(per_row: list[int], counts: list[int], modality: str = "image") -> list[list[int]]:
    """Raise unless rows with `per_row` placeholders have room for visual inputs of `counts` tokens, none split.

    Returns:
        `list[list[int]]`: the numbers of each row's visual inputs.
    """
    if sum(per_row) != sum(counts):
        raise ValueError(
            f"The prompt has {sum(per_row)} {modality} placeholders, but its {len(counts)} {modality}(s) have "
            f"{sum(counts)} visual tokens: use the checkpoint's own processor, and as many images as placeholders."
        )
    rows: list[list[int]] = []
    image = 0
    for row, room in enumerate(per_row):
        first = image
        while room > 0:
            room -= counts[image]
            image += 1
        if room < 0:
            raise ValueError(
                f"The {modality} placeholders of prompt {row} end in the middle of a {modality}: prompts and "
                f"{modality}s are not in the same order."
            )
        rows.append(list(range(first, image)))
    return rows


def run_lengths(rows: list[list[int]], apart: int = 0) -> list[int]:
    """How many columns are in each run of each row, in order; a run goes on behind `apart` other columns."""
    lengths: list[int] = []
    for row in rows:
        for before, column in zip([-apart - 2, *row], row):
            if column - before <= apart + 1:
                lengths[-1] += 1
            else:
                lengths.append(1)
    return lengths


def _compact_index(
    kept: torch.Tensor, counts: torch.Tensor, length: int, right_padded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    front = (~kept).long().argsort(dim=-1, stable=True)  # kept positions first, in order
    place = torch.arange(length, device=kept.device).expand(len(kept), -1)
    if not right_padded:
        place = place - (length - counts)[:, None]
    mask = (place >= 0) & (place < counts[:, None])
    return front.gather(1, place.clamp(0, max(kept.shape[1] - 1, 0))).masked_fill(~mask, 0), mask


def kept_rows(plan: PromptPlan, rows: torch.Tensor) -> torch.Tensor:
    """`logits_to_keep` given as original positions, in the compact prompt."""
    place = plan.kept.long().cumsum(-1) - 1 + (~plan.mask).long().cumprod(-1).sum(-1, keepdim=True)
    if not plan.kept[:, rows].all() or (place[:, rows] != place[:1, rows]).any():
        raise ValueError(
            "logits_to_keep points at dropped or padded positions, or at other places in each row: slice the logits."
        )
    return place[0, rows]


def full_length(logits: torch.Tensor, plan: PromptPlan) -> torch.Tensor:
    """Logits at the length of the original prompt, dropped positions repeating the kept one before them."""
    if logits.shape[1] != plan.mask.shape[1]:
        raise ValueError("full_length_logits needs all logits: leave logits_to_keep at 0.")
    side = "right" if plan.mask[:, 0].all() else "left"
    return scatter_to_prompt(logits, plan.kept, side, fill="previous")
