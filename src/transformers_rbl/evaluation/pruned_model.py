"""What evaluation asks of a pruned model, for a type checker: the full classes of every family answer it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from transformers.utils.generic import ModelOutput

from ..models.codebook import RedundancyCodebook
from ..models.pruning import PruningConfig


class HeadlessModel(Protocol):
    """A pruned model without its language-model head."""

    def prune_image_features(
        self, outputs: ModelOutput, pruning: PruningConfig | None = None, **arguments: Any
    ) -> ModelOutput:
        """Prune features that were encoded without pruning."""
        ...

    def token_kinds(self, modality: str = "image", **arguments: Any) -> list[torch.Tensor]:
        """What each visual token is, an image a row."""
        ...


class PrunedModel(Protocol):
    """A full pruned model: [`RBLGenerationMixin`] beside a stock class."""

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def codebook(self) -> RedundancyCodebook | None: ...

    @property
    def model(self) -> HeadlessModel: ...

    def __call__(self, **inputs: Any) -> ModelOutput:
        """`forward`."""
        ...

    def get_image_features(self, *, pruning: PruningConfig | None = None, **arguments: Any) -> ModelOutput:
        """The visual tokens that stay."""
        ...

    def generate(self, *, pruning: PruningConfig | None = None, **arguments: Any) -> torch.Tensor:
        """Ids `(batch, n)`, the prompt's first."""
        ...
