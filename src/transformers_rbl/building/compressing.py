"""A codebook with fewer prototypes, and a bound on how far that can change a score."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from ..models.codebook import RedundancyCodebook


@dataclass(frozen=True)
class Compressed:
    """A smaller codebook and what it may cost.

    Args:
        codebook ([`RedundancyCodebook`]): prototypes of the larger one, in its order.
        rows (`torch.LongTensor` of shape `(m,)`): which ones.
        bound (`float`): no token's cosine score falls by more than this; none rises.
    """

    codebook: RedundancyCodebook
    rows: torch.Tensor
    bound: float


def compress(codebook: RedundancyCodebook, max_change: float | None = None, count: int | None = None) -> Compressed:
    """Keep the fewest prototypes that a greedy choice finds, so that each of the others lies near one of them.

    Greedy k-centres (Gonzalez 1985, at most twice the best bound): first the medoid, the prototype of largest summed
    cosine with all, then again and again the one farthest from those chosen. For a token x of unit length and a
    prototype p with its nearest chosen m, cos(x, p) - cos(x, m) = x · (p - m) <= ||p - m||: the largest such distance
    bounds what a score, the largest cosine, can lose. It cannot gain, as the chosen ones are among the old.

    Args:
        codebook ([`RedundancyCodebook`]): stays as it is.
        max_change (`float`, *optional*): the bound to keep; as many prototypes stay as that takes.
        count (`int`, *optional*): how many stay. Give one of the two.

    Raises:
        ValueError: unless exactly one is given, and is in range.
    """
    if (max_change is None) == (count is None):
        raise ValueError("Give exactly one of max_change and count.")
    if max_change is not None and not max_change >= 0:
        raise ValueError(f"max_change is a distance of at least 0; got {max_change}.")
    unit = codebook.unit_prototypes
    if count is not None and not 1 <= count <= len(unit):
        raise ValueError(f"count is from 1 to the codebook's {len(unit)} prototypes; got {count}.")
    pick, rows = int((unit @ unit.sum(0)).argmax()), []
    distances = torch.full((len(unit),), torch.inf, device=unit.device)
    while True:
        rows.append(pick)
        distances = torch.minimum(distances, (unit - unit[pick]).norm(dim=-1))
        bound, pick = float(distances.max()), int(distances.argmax())
        if bound == 0 or (len(rows) == count if max_change is None else bound <= max_change):
            break
    kept = torch.tensor(sorted(rows), device=unit.device)
    smaller = RedundancyCodebook(codebook.prototypes[kept], **copy.deepcopy(codebook.metadata()))
    if "image_ids" in (source := smaller.built_with.get("source", {})):
        source["image_ids"] = [source["image_ids"][row] for row in kept.tolist()]
    smaller.built_with["compressed"] = {"from": len(unit), "bound": round(bound, 6)}
    return Compressed(smaller, kept, bound)
