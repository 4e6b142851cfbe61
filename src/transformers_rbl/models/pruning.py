"""Which visual tokens stay: settings, redundancy scores and selection, as pure tensor functions.

The method in three lines (arXiv 2503.20540): a codebook holds prototypes of redundant visual tokens; a token's score is
its largest cosine with a prototype (`max_cosine`); tokens with high scores are dropped, by threshold or by a fixed
share (`select_tokens`).
"""

from __future__ import annotations

import inspect
import math
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

import torch


# What a visual token is, within the sequence that replaces one image (see `PruningConfig.newlines` and `.tiles`).
BASE, PATCH, NEWLINE = 0, 1, 2

NEWLINE_POLICIES = ("all", "row", "last")
TILE_POLICIES = ("all", "base")


@dataclass(frozen=True)
class PruningConfig:
    """Everything that decides which visual tokens a model keeps. Immutable; saved as a plain dict in the model's
    config.

    Args:
        keep_ratio (`float`, *optional*): share of the scored tokens of each image to keep, in (0, 1].
        threshold (`float`, *optional*): keep tokens whose score is below it (a cosine for `score="cosine"`). Give
            exactly one of `keep_ratio` and `threshold`. Above 1, a cosine threshold keeps everything.
        score (`str`, defaults to `"cosine"`): how redundant a token is, a key of [`SCORERS`]: by the codebook
            `"cosine"`, `"softmax"`, `"double_softmax"`; without one `"random"`, `"cls_similarity_low"`,
            `"cls_similarity_high"`, `"diversity"`.
        min_tokens (`int`, defaults to 1): fewest scored tokens kept per image (per frame with `per_frame`), whatever
            the threshold says.
        newlines (`str`, defaults to `"all"`): which row-end tokens stay: `"all"`; `"row"`, those of rows that keep a
            patch (the count then depends on the content); `"last"`, one per image. Row-end tokens are never scored.
        tiles (`str`, defaults to `"all"`): `"base"` drops the anyres tiles (with their row ends) before the vision
            tower runs, so that only the base image's tokens are scored and counted.
        per_frame (`bool`, defaults to `True`): score and count each video frame by itself, not the video as a whole.
        seed (`int`, defaults to 0): draw of `score="random"`: a token's score depends on it, on the token's place in
            its image and on the frame, so that an image keeps the same tokens in any batch.
        enabled (`bool`, defaults to `True`): `False` makes the model the stock model.

    Raises:
        ValueError: for any setting out of range, in a sentence that names it.
    """

    keep_ratio: float | None = None
    threshold: float | None = None
    score: str = "cosine"
    min_tokens: int = 1
    newlines: str = "all"
    tiles: str = "all"
    per_frame: bool = True
    seed: int = 0
    enabled: bool = True

    def __post_init__(self):
        for name in ("keep_ratio", "threshold"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
                raise ValueError(f"{name} must be a number, got {value!r}.")
            if value is not None:
                object.__setattr__(self, name, float(value))  # a NumPy number would not survive JSON
        if self.enabled and (self.keep_ratio is None) == (self.threshold is None):
            given = "neither was" if self.keep_ratio is None else "both were"
            raise ValueError(f"Give exactly one of keep_ratio and threshold; {given} given.")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio is the share of visual tokens to keep, in (0, 1]; got {self.keep_ratio}.")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite; got {self.threshold}.")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 1:
            raise ValueError(
                f"min_tokens must be an integer of at least 1 (no image may vanish); got {self.min_tokens!r}."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be an integer from 0 to 2**32 - 1; got {self.seed!r}.")
        for name, allowed in (("score", tuple(SCORERS)), ("newlines", NEWLINE_POLICIES), ("tiles", TILE_POLICIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        for name in ("per_frame", "enabled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}.")

    @property
    def needs_codebook(self) -> bool:
        return "unit_prototypes" in scorer_arguments(self.score)

    @property
    def needs_cls_similarity(self) -> bool:
        return "cls_similarity" in scorer_arguments(self.score)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any] | PruningConfig) -> PruningConfig:
        """The settings in a saved config. Unknown keys raise: a newer version's setting must not be ignored in
        silence."""
        if isinstance(settings, cls):
            return settings
        if not isinstance(settings, dict):
            raise ValueError(f"Pruning settings must be a PruningConfig or a dict, got {type(settings).__name__}.")
        if unknown := sorted(set(settings) - {field.name for field in fields(cls)}):
            raise ValueError(
                f"Unknown pruning setting(s) {', '.join(unknown)}: a typo, or saved by a newer version of "
                "transformers_rbl."
            )
        return cls(**settings)


def kept_token_count(num_tokens: int, keep_ratio: float, min_tokens: int = 1) -> int:
    """How many of `num_tokens` scored tokens a keep ratio leaves: `round(num_tokens * keep_ratio)`, at least
    `min_tokens`, at most all. The only place that rounds; the model, serving and docs all ask here."""
    return min(num_tokens, max(min_tokens, round(num_tokens * keep_ratio)))


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


# A scorer returns (L,) float32, higher is more redundant, from any of these arguments; their names say what it needs:
#   tokens (L, d) float32; unit_prototypes (n, d) float32, the codebook's; cls_similarity (L,) float32, cosines of the
#   vision tower's patches with its [cls] token; count, how many will be kept (None under a threshold); seed; frame, the
#   number of a video's frame.
SCORERS = {
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


def score_tokens(score: str, **given) -> torch.Tensor:
    """Scores `(L,)` float32 of one image's (or frame's) tokens by the scorer of that name, in float32 and under no
    autocast.

    Args:
        score (`str`): a key of [`SCORERS`].
        given: whatever is at hand of a scorer's arguments, see [`SCORERS`]; None counts as absent for tensors.

    Raises:
        ValueError: if the scorer does not exist, or needs something that is not given.
    """
    if score not in SCORERS:
        raise ValueError(f"score must be one of {', '.join(SCORERS)}; got {score!r}.")
    needed = {name: given.get(name) for name in scorer_arguments(score)}
    if absent := sorted(name for name, value in needed.items() if value is None and name != "count"):
        raise ValueError(f"score={score!r} needs {', '.join(absent)}, which this call does not have.")
    device = next(value.device.type for value in needed.values() if isinstance(value, torch.Tensor))
    with torch.no_grad(), torch.autocast(device, enabled=False):  # autocast would turn products to half precision
        return SCORERS[score](
            **{k: v.detach().float() if isinstance(v, torch.Tensor) else v for k, v in needed.items()}
        )


def select_tokens(scores: torch.Tensor, pruning: PruningConfig) -> torch.Tensor:
    """Keep the least redundant tokens: those under the threshold, or the `kept_token_count` lowest.

    Args:
        scores (`torch.Tensor` of shape `(L,)`): redundancy, higher is more redundant. Equal scores keep the earlier
            token. NaN counts as lowest: a model that overflows shows it, as the stock model would.
        pruning (`PruningConfig`): `keep_ratio` or `threshold`, and `min_tokens`.

    Returns:
        `torch.BoolTensor` of shape `(L,)`.
    """
    ranked = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).argsort(stable=True)
    if pruning.keep_ratio is not None:
        count = kept_token_count(len(scores), pruning.keep_ratio, pruning.min_tokens)
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, ranked[:count], True)
    # ~(>=) and not (<), so that NaN stays.
    return (~(scores >= pruning.threshold)).index_fill_(0, ranked[: pruning.min_tokens], True)


def keep_newlines(kept: torch.Tensor, kinds: torch.Tensor, policy: str) -> torch.Tensor:
    """Which row-end tokens stay.

    Args:
        kept (`torch.BoolTensor` of shape `(L,)`): the scored tokens that stay.
        kinds (`torch.LongTensor` of shape `(L,)`): BASE, PATCH or NEWLINE per token; a row is its patches, then its
            newline.
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


def _cosines(tokens: torch.Tensor, unit_prototypes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(tokens, dim=-1) @ unit_prototypes.T
