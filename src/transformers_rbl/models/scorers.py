"""Every rule that ranks visual tokens by redundancy, one function each; what it needs stands in its argument names.

A scorer returns `(L,)` float32, higher is more redundant, from any of these arguments:
    tokens (L, d) float32; unit_prototypes (n, d) float32, the codebook's; cls_similarity (L,) float32, cosines of the
    vision tower's patches with its [cls] token; count, how many will be kept (None under a threshold); seed; frame, the
    number of a video's frame.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch


def max_cosine(tokens: torch.Tensor, unit_prototypes: torch.Tensor, block_elements: int = 2**24) -> torch.Tensor:
    """s_i = max_j cos(x_i, p_j), the paper's redundancy score.

    Args:
        tokens (`torch.Tensor` of shape `(L, d)`): visual tokens, float32.
        unit_prototypes (`torch.Tensor` of shape `(n, d)`): prototypes of unit length, float32.
        block_elements (`int`): largest product held at once, in elements; bounds memory for any L.

    Returns:
        `torch.Tensor` of shape `(L,)`. A zero token scores 0.
    """
    rows = max(1, block_elements // len(unit_prototypes))
    # The token's norm divides out of the maximum: one pass over L numbers instead of a normalised copy of the tokens.
    # Prototypes on the left: the faster order of the product on CPUs (docs/results/prefill.md).
    largest = torch.cat([(unit_prototypes @ block.T).amax(dim=0) for block in tokens.split(rows)])
    return largest / tokens.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)


def max_softmax(tokens: torch.Tensor, unit_prototypes: torch.Tensor) -> torch.Tensor:
    """s_i = max_j softmax_j(c)_ij with c_ij = cos(x_i, p_j): how clearly a token prefers one prototype to the others.

    Upstream's `high_info_patch_single_smx`. Unlike a cosine it depends on all prototypes, repeated ones included.
    """
    return _cosines(tokens, unit_prototypes).softmax(dim=1).amax(dim=1)


def max_double_softmax(tokens: torch.Tensor, unit_prototypes: torch.Tensor) -> torch.Tensor:
    """s_i = max_j softmax_i(c)_ij * softmax_j(c)_ij: token and prototype prefer each other, among the tokens given.

    Upstream's `high_info_patch_double_smx` and `video_high_info_patch_double_smx`.
    """
    cosines = _cosines(tokens, unit_prototypes)
    return (cosines.softmax(dim=0) * cosines.softmax(dim=1)).amax(dim=1)


def random_scores(tokens: torch.Tensor, seed: int, frame: int) -> torch.Tensor:
    """Uniform in [0, 1): the baseline that any rule has to beat (upstream's `random_patch`)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + frame)
    return torch.rand(len(tokens), generator=generator).to(tokens.device)


def low_cls_similarity(cls_similarity: torch.Tensor) -> torch.Tensor:
    """Keeps the patches least similar to the vision tower's [cls] token (upstream's `low_sim_patch`)."""
    return cls_similarity


def high_cls_similarity(cls_similarity: torch.Tensor) -> torch.Tensor:
    """Keeps the patches most similar to the vision tower's [cls] token (upstream's `high_sim_patch`)."""
    return -cls_similarity


def greedy_diversity(tokens: torch.Tensor, count: int | None) -> torch.Tensor:
    """Greedy max-min diversity, DivPrune's rule (arXiv 2503.02175, algorithm 1): first the token farthest from its
    nearest neighbour, then again and again the one farthest from all those chosen, by cosine.

    A token's score is its largest cosine with the tokens chosen before it (-1 for the first), which never falls from
    one choice to the next: the `count` lowest scores are the first `count` choices, and a threshold t keeps choosing
    until every other token is within t of a chosen one. Beyond `count` (None: all) scores are infinite.
    """
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-math.inf)
    scores = torch.full_like(cosines[0], math.inf)
    nearest, chosen = cosines.amax(dim=1), torch.zeros_like(scores, dtype=torch.bool)
    for step in range(len(tokens) if count is None else count):
        pick = nearest.masked_fill(chosen, math.inf).argmin()
        scores[pick] = nearest[pick] if step else -1.0
        chosen[pick] = True
        nearest = cosines[pick] if step == 0 else torch.maximum(nearest, cosines[pick])
    return scores


SCORERS: dict[str, Callable[..., torch.Tensor]] = {
    "cosine": max_cosine,
    "softmax": max_softmax,
    "double_softmax": max_double_softmax,
    "random": random_scores,
    "cls_similarity_low": low_cls_similarity,
    "cls_similarity_high": high_cls_similarity,
    "diversity": greedy_diversity,
}


def scorer_arguments(score: str) -> set[str]:
    """Names of what a scorer needs, by its signature."""
    parameters = inspect.signature(SCORERS[score]).parameters.values()
    return {parameter.name for parameter in parameters if parameter.default is parameter.empty}


def score_tokens(score: str, **inputs: Any) -> torch.Tensor:
    """Scores `(L,)` float32 of one image's (or frame's) tokens by the scorer of that name, in float32 and under no
    autocast.

    Args:
        score (`str`): a key of [`SCORERS`].
        inputs: whatever is at hand of a scorer's arguments, see [`SCORERS`]; None counts as absent for tensors.

    Raises:
        ValueError: if the scorer does not exist, or needs something that is absent.
    """
    if score not in SCORERS:
        raise ValueError(f"score must be one of {', '.join(SCORERS)}; got {score!r}.")
    needed = {name: inputs.get(name) for name in scorer_arguments(score)}
    if absent := sorted(name for name, value in needed.items() if value is None and name != "count"):
        raise ValueError(f"score={score!r} needs {', '.join(absent)}, which this call does not have.")
    # A rule of the user's may read no tensor at all; the tokens say where it runs.
    tensors = [value for value in (*needed.values(), *inputs.values()) if isinstance(value, torch.Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    with torch.no_grad(), torch.autocast(device, enabled=False):  # autocast would turn products to half precision
        return SCORERS[score](
            **{k: v.detach().float() if isinstance(v, torch.Tensor) else v for k, v in needed.items()}
        )


def _cosines(tokens: torch.Tensor, unit_prototypes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(tokens, dim=-1) @ unit_prototypes.T
