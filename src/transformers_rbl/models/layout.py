"""Where the visual tokens of one image or video lie, and the one place where it is decided which of them stay.

transformers, serving engines, the builder, plots and the demo all ask a [`VisualLayout`].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .codebook import RedundancyCodebook, choose
from .merging import Choice, places
from .pruning import PruningConfig


# What a visual token is, within the sequence that replaces one image (see `PruningConfig.newlines` and `.tiles`).
# ABSENT is a patch of a tile that was not encoded.
BASE, PATCH, NEWLINE, ABSENT = 0, 1, 2, 3


@dataclass(frozen=True, eq=False)
class VisualLayout:
    """The visual tokens of one image or video, in the order of their placeholders.

    Args:
        kinds (`torch.LongTensor` of shape `(L,)`): BASE, PATCH, NEWLINE or ABSENT per token. An image without tiles has
            patches and, in some families, row ends; one with tiles has its base image (thumbnail) first. A row is its
            patches, then its newline.
        frames (`int`, defaults to 1): equal parts of the scored tokens, a video's frames.
        grid (`tuple[int, int]`, *optional*): rows and columns of the base image, or of each frame; square by default.
        numbers (`tuple[int, ...]`, *optional*): how many of each kind there are; counted by default. What is asked
            of a layout while a device computes is answered from these, without a wait.
    """

    kinds: torch.Tensor
    frames: int = 1
    grid: tuple[int, int] | None = None
    numbers: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.numbers:
            object.__setattr__(self, "numbers", tuple(self.kinds.bincount(minlength=4).tolist()))

    def __len__(self) -> int:
        return len(self.kinds)

    @classmethod
    def of_patches(cls, count: int, frames: int = 1, grid: tuple[int, int] | None = None) -> VisualLayout:
        """`count` patches and nothing else."""
        return cls(torch.full((count,), PATCH), frames, grid, (0, count, 0, 0))

    @property
    def has_tiles(self) -> bool:
        return self.numbers[BASE] > 0

    def base_alone(self, pruning: PruningConfig) -> bool:
        """Whether the tiles leave before anything is encoded."""
        return pruning.enabled and pruning.tiles == "base" and self.has_tiles

    def where_needed(self, pruning: PruningConfig) -> bool:
        """Whether the tiles wait for what the base image says."""
        return pruning.enabled and pruning.tiles == "where_needed" and self.has_tiles

    def scored(self, pruning: PruningConfig) -> torch.Tensor:
        """`(L,)` bool: the tokens that are scored and counted. Row ends never are."""
        return self.kinds == BASE if self.base_alone(pruning) else self.kinds < NEWLINE

    def scored_count(self, pruning: PruningConfig) -> int:
        """How many those are."""
        return self.numbers[BASE] if self.base_alone(pruning) else self.numbers_scored

    @property
    def numbers_scored(self) -> int:
        """Tokens that are there, row ends aside."""
        return self.numbers[BASE] + self.numbers[PATCH]

    def keep(
        self,
        tokens: torch.Tensor,
        pruning: PruningConfig,
        codebook: RedundancyCodebook | None = None,
        cls_similarity: torch.Tensor | None = None,
        **inputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Which of all L tokens stay.

        Args:
            tokens (`torch.Tensor` of shape `(n, d)`): the scored ones, see [`~VisualLayout.scored`].
            pruning (`PruningConfig`): the settings.
            codebook ([`RedundancyCodebook`], *optional*): needed by the scorers that compare with prototypes.
            cls_similarity (`torch.Tensor` of shape `(n,)`, *optional*): needed by the scorers of that name.
            inputs (`torch.Tensor`, *optional*): what else the scorer needs, see [`~VisualLayout.parts`].

        Returns:
            `torch.BoolTensor` of shape `(L,)`, on the tokens' device.

        Raises:
            ValueError: if the number of tokens is not this layout's.
        """
        parts = self.parts(tokens, pruning, cls_similarity=cls_similarity, **inputs)
        return self.mask(choose(parts, pruning, codebook), pruning)

    def parts(
        self, tokens: torch.Tensor, pruning: PruningConfig, **inputs: torch.Tensor | None
    ) -> list[dict[str, Any]]:
        """The parts that are scored and counted each by itself, a video's frames or the whole, for [`choose`].

        Args:
            tokens (`torch.Tensor` of shape `(n, d)`): the scored ones, see [`~VisualLayout.scored`].
            pruning (`PruningConfig`): the settings.
            inputs (`torch.Tensor`, *optional*): what else the scorer needs: `(n, ...)`, and `question` `(m, d)`.

        Raises:
            ValueError: if the number of tokens is not this layout's.
        """
        if len(tokens) != (expected := self.scored_count(pruning)):
            raise ValueError(
                f"{len(tokens)} visual tokens were to be scored where {expected} were expected: pruning does not know "
                "this vision tower's layout."
            )
        count = self._parts(pruning)
        given = {name: on_device(value, tokens) for name, value in inputs.items() if value is not None}
        parts: list[dict[str, Any]] = [{"frame": frame} for frame in range(count)]
        for name, value in {"tokens": tokens, **given}.items():
            values = [value] * count if name == "question" else value.split(max(1, len(tokens) // count))
            for part, own in zip(parts, values if len(tokens) else [value] * count, strict=True):
                part[name] = own
        return parts

    def mask(self, choices: list[Choice], pruning: PruningConfig) -> torch.Tensor:
        """`(L,)` bool: which of all tokens stay, row ends among them, given what was chosen of each part."""
        kept = torch.cat([choice.kept for choice in choices])
        scored = on_device(self.scored(pruning), kept)
        kept = torch.zeros_like(scored).masked_scatter_(scored, kept)
        return kept | self.kept_newlines(kept, pruning)

    def stay(
        self,
        tokens: torch.Tensor,
        choices: list[Choice],
        mask: torch.Tensor,
        pruning: PruningConfig,
        count: int | None = None,
    ) -> torch.Tensor:
        """`(kept, d)`: what stays of all L tokens, or of another view of them; merged where the choices say so.

        Args:
            tokens (`torch.Tensor` of shape `(L, d)`): row ends among them.
            choices (`list[Choice]`): of each of the [`~VisualLayout.parts`].
            mask (`torch.BoolTensor` of shape `(L,)`): see [`~VisualLayout.mask`].
            pruning (`PruningConfig`): the settings.
            count (`int`, *optional*): how many stay, where that is known without a look.
        """
        if any(choice.weights is not None for choice in choices):
            parts = self.take_scored(tokens, pruning).split([len(choice.kept) for choice in choices])
            merged = torch.cat([choice.merged(part) for choice, part in zip(choices, parts)])
            tokens = tokens.masked_scatter(on_device(self.scored(pruning), tokens)[:, None], merged)
        return tokens[places(on_device(mask, tokens), count)]

    def take_scored(self, values: torch.Tensor, pruning: PruningConfig) -> torch.Tensor:
        """`(n, ...)`: of the values of all L tokens, those of the ones that are scored."""
        count = self.scored_count(pruning)
        return values if count == len(values) else values[places(on_device(self.scored(pruning), values), count)]

    def with_unread(self, tokens: torch.Tensor, newline: torch.Tensor | None, pruning: PruningConfig) -> torch.Tensor:
        """`(L, d)`: the scored tokens `(n, d)` where they lie, and row ends `newline` `(d,)` for those that were not
        encoded."""
        rest = tokens.new_zeros(1, tokens.shape[-1]) if newline is None else newline[None].to(tokens)
        scored = self.scored(pruning)
        rows = torch.where(scored, scored.cumsum(0) - 1, len(tokens))
        return torch.cat([tokens, rest])[on_device(rows, tokens)]

    def kept_newlines(self, kept: torch.Tensor, pruning: PruningConfig) -> torch.Tensor:
        """`(L,)` bool: row ends that stay beside the scored tokens `kept` `(L,)`."""
        if not self.numbers[NEWLINE] or (pruning.enabled and self.base_alone(pruning) and pruning.newlines == "all"):
            return torch.zeros_like(kept)  # in the second case rows end with the tiles, and those are gone
        return keep_newlines(kept, on_device(self.kinds, kept), pruning.newlines if pruning.enabled else "all")

    def kept_newline_count(self, pruning: PruningConfig) -> int | None:
        """How many row ends stay; None where that depends on the patches that do."""
        newlines = self.numbers[NEWLINE]
        if not pruning.enabled or not newlines or (pruning.newlines == "all" and not self.base_alone(pruning)):
            return newlines
        if pruning.newlines == "last":
            return 1
        return 0 if self.base_alone(pruning) else None

    def kept_count(self, pruning: PruningConfig) -> int:
        """How many tokens stay, known before the image is: for keep ratios, and row ends that do not depend on it.

        Raises:
            ValueError: for a threshold, or `newlines="row"` where there are row ends.
        """
        if not pruning.enabled:
            return len(self)
        newlines = self.kept_newline_count(pruning)
        if pruning.keep_ratio is None or newlines is None:
            setting = f"threshold={pruning.threshold}" if pruning.keep_ratio is None else 'newlines="row"'
            raise ValueError(f"{setting} keeps a number of visual tokens that depends on the image.")
        return self.kept_scored_count(pruning) + newlines

    def kept_scored_count(self, pruning: PruningConfig) -> int:
        """How many of the scored tokens a keep ratio leaves."""
        parts, scored = self._parts(pruning), self.scored_count(pruning)
        return parts * (pruning.count_of(scored // parts) or 0)

    def of_frames(self, there: list[bool]) -> torch.Tensor:
        """`(L,)` bool: a video's tokens of these frames, and its row ends."""
        frame = (self.kinds == PATCH).cumsum(0).sub(1).clamp(min=0) // (self.numbers_scored // self.frames)
        return torch.tensor(there)[frame] | (self.kinds == NEWLINE)

    def encoded(self, pruning: PruningConfig) -> VisualLayout:
        """The tokens that are encoded at all: with `tiles="base"` the base image's and one row end, which engines
        append to an image without tiles."""
        if not self.base_alone(pruning):
            return self
        base = self.kinds[self.kinds == BASE]
        return VisualLayout(torch.cat([base, base.new_tensor([NEWLINE])]), grid=self.grid)

    @property
    def grids(self) -> dict[str, torch.Tensor]:
        """Positions of tokens as grids over the image.

        Returns:
            `dict[str, torch.LongTensor]`: `"base"`, the base image's grid (or an image's without tiles, or that of each
            frame, one below the other), and `"tiles"`, that of all tiles with their padding gone, where there are any.
            Each `(rows, columns)`; both cover the whole image.
        """
        kinds, positions = self.kinds.cpu(), torch.arange(len(self))
        base, patches = positions[kinds == BASE], positions[kinds == PATCH]
        if not len(base):  # an image without tiles is its own base
            base, patches = patches, base
        columns = round((len(base) / self.frames) ** 0.5) if self.grid is None else self.grid[1]
        grids = {"base": base.view(-1, columns)}
        if len(patches):
            grids["tiles"] = patches.view(max(1, int((kinds == NEWLINE).sum())), -1)
        return grids

    def _parts(self, pruning: PruningConfig) -> int:
        """Parts that are scored and counted each by itself."""
        return self.frames if pruning.per_frame else 1


def kept_counts(layouts: list[VisualLayout], masks: list[torch.Tensor], rules: list[PruningConfig]) -> list[int]:
    """How many tokens of each image stay. Where the settings do not tell, a threshold and `newlines="row"`, the device
    does, asked once for all images."""
    try:
        return [layout.kept_count(rule) for layout, rule in zip(layouts, rules)]
    except ValueError:
        return torch.stack([mask.sum() for mask in masks]).tolist()


def on_device(values: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`values` where `other` is, without waiting for what that device still computes."""
    return values.to(other.device, non_blocking=True)


def keep_newlines(kept: torch.Tensor, kinds: torch.Tensor, policy: str) -> torch.Tensor:
    """Which row-end tokens stay.

    Args:
        kept (`torch.BoolTensor` of shape `(L,)`): the scored tokens that stay.
        kinds (`torch.LongTensor` of shape `(L,)`): BASE, PATCH or NEWLINE per token.
        policy (`str`): `"all"`, `"row"` or `"last"`, see [`PruningConfig`].
    """
    newlines = kinds == NEWLINE
    if policy == "all":
        return newlines
    if policy == "last":
        return newlines & (newlines.cumsum(0) == newlines.sum())
    row = newlines.cumsum(0) - newlines.long()
    patches_kept = torch.zeros(len(kinds) + 1, dtype=torch.long, device=kinds.device)
    patches_kept.index_add_(0, row, (kept & (kinds == PATCH)).long())
    return newlines & (patches_kept[row] > 0)
