"""What becomes of the tokens that are dropped: nothing, or each is averaged into a token that stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch


MERGE_POLICIES = ("none", "nearest")


@dataclass(frozen=True)
class Choice:
    """Which tokens of one image stay, and what they take in of the others.

    Args:
        kept (`torch.BoolTensor` of shape `(L,)`).
        weights (`torch.Tensor` of shape `(k, L)`, *optional*): float; the k kept tokens, in their order, become
            `weights @ tokens`. None: they stay what they are.
    """

    kept: torch.Tensor
    weights: torch.Tensor | None = None

    def merged(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `(L, d)`, or another view of them, with the kept ones as they become, in their own dtype (summed in
        float32). The others are left as they are: nobody reads them."""
        if self.weights is None:
            return tokens
        with torch.autocast(tokens.device.type, enabled=False):
            become = self.weights.to(tokens.device, torch.float32) @ tokens.float()
            places_of_kept = places(self.kept, len(self.weights)).to(tokens.device)
            return tokens.index_copy(0, places_of_kept, become.to(tokens.dtype))


def nearest_merging(tokens: torch.Tensor, kept: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Each dropped token goes to the kept token nearest by cosine (the first of several), and a kept token becomes the
    mean of itself and those that come to it. Weighted by the number n_k of tokens that a kept one stands for, the sum
    is conserved: sum_k n_k y_k = sum_i x_i (ToMe's average, arXiv 2210.09461, section 3, by whatever rule chose).

    Args:
        tokens (`torch.Tensor` of shape `(L, d)`): float32.
        kept (`torch.BoolTensor` of shape `(L,)`): one token at least.
        count (`int`, *optional*): how many are kept, where that is known without a look.

    Returns:
        `torch.Tensor` of shape `(k, L)`: rows that sum to 1, see [`Choice`].
    """
    stay = places(kept, count)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    target = (unit[stay] @ unit.T).argmax(dim=0)
    target[stay] = torch.arange(len(stay), device=target.device)
    return averages(target, len(stay))


def places(kept: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """`(k,)`: where the kept tokens are, in order. With their number given, the device is not waited for."""
    if count is None:
        return kept.nonzero()[:, 0]
    return kept.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def averages(target: torch.Tensor, count: int) -> torch.Tensor:
    """`(count, L)` float32: the mean of the tokens that have each target; `target` `(L,)` holds them, from 0."""
    belongs = (target == torch.arange(count, device=target.device)[:, None]).float()
    return belongs / belongs.sum(dim=1, keepdim=True)
