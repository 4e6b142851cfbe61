"""Settings in words: the same ones in tables, reports and pictures."""

from __future__ import annotations

from dataclasses import fields

from .models.pruning import PruningConfig


def describe_pruning(pruning: PruningConfig | None) -> str:
    """A setting in words: the score, the keep ratio or threshold, and whatever else is not as it is by default.

    Args:
        pruning ([`PruningConfig`], *optional*): None is the stock model.

    Returns:
        `str`, for instance `"cosine, keep_ratio 0.15, tiles base"`; `"unpruned"` where nothing is dropped.
    """
    if pruning is None or not pruning.enabled:
        return "unpruned"
    limit = "keep_ratio" if pruning.keep_ratio is not None else "threshold"
    words = [pruning.score, f"{limit} {getattr(pruning, limit)}"]
    for field in fields(pruning):
        value = getattr(pruning, field.name)
        if field.name not in ("score", "keep_ratio", "threshold", "enabled") and value != field.default:
            words.append(f"{field.name} {value}")
    return ", ".join(words)
