"""Which split a composition of things and a region of a photo belong to: one each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ..testbed import SPLITS


def belongs(names: Sequence[str], split: str) -> bool:
    """Whether a set of things may be shown together in the split, by hash: 80% of the sets are train, 8% validation,
    12% test. One thing alone may be in all of them."""
    place = int(hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest(), 16) % 100
    return len(names) == 1 or SPLITS[(place >= 80) + (place >= 88)] == split


def photo_columns(split: str) -> tuple[float, float]:
    """From where to where a photo belongs to the split, in shares of its width."""
    return {"train": (0, 0.6), "validation": (0.6, 0.75), "test": (0.75, 1)}[split]
