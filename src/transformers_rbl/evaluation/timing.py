"""How long a prefill takes, and what its KV cache weighs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache
from transformers.utils.generic import ModelOutput

from ..models.generation_rbl import RBLGenerationMixin
from ..models.pruning import PruningConfig
from ..models.seam import CACHE


@torch.no_grad()
def timed_prefill(model: RBLGenerationMixin, **inputs: Any) -> tuple[float, int, ModelOutput]:
    """One pass over a prompt, the last logits only.

    Args:
        model (`RBLGenerationMixin`): in eval mode.
        inputs: of its `forward`.

    Returns:
        `tuple[float, int, ModelOutput]`: seconds, bytes of the KV cache, and the output.
    """
    _synchronise(model.device)
    start = time.perf_counter()
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    _synchronise(model.device)
    seconds = time.perf_counter() - start
    return seconds, cache_bytes(output[CACHE]), output


def cache_bytes(cache: Cache) -> int:
    """What a cache weighs: keys and values, and the states of layers that have none (linear attention)."""
    held = [value for layer in cache.layers for value in vars(layer).values()]
    return sum(value.nbytes for value in held if isinstance(value, torch.Tensor))


def compare_prefills(
    model: RBLGenerationMixin, inputs: Mapping[str, Any], rules: Mapping[str, PruningConfig | None], repeats: int
) -> tuple[dict[str, float], dict[str, int], ModelOutput]:
    """Prefill under several settings in turn, so that what else the machine does meets all of them.

    Args:
        model (`RBLGenerationMixin`): in eval mode.
        inputs (`BatchFeature` or `Mapping[str, Any]`): prompts with their images.
        rules (`Mapping[str, PruningConfig | None]`): settings by name; None is the model's own.
        repeats (`int`): timed prefills of each, after one that warms up.

    Returns:
        `tuple[dict[str, float], dict[str, int], ModelOutput]`: by name median seconds and bytes of the KV cache, and
        the last one's output.

    Raises:
        ValueError: without settings, or for fewer than one repeat.
    """
    if not rules or repeats < 1:
        raise ValueError("Comparing prefills takes one setting and one repeat at least.")
    seconds: dict[str, list[float]] = {name: [] for name in rules}
    sizes: dict[str, int] = {}
    output = ModelOutput()
    for _ in range(repeats + 1):
        for name, rule in rules.items():
            spent, sizes[name], output = timed_prefill(model, **inputs, pruning=rule)
            seconds[name].append(spent)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}, sizes, output


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
