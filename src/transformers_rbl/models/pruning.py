"""Which visual tokens stay: settings, counts and selection.

The method in three lines (arXiv 2503.20540): a codebook holds prototypes of redundant visual tokens; a token's score is
its largest cosine with a prototype (`max_cosine` in scorers.py); tokens with high scores are dropped, by threshold or
by a fixed share (`select_tokens`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

import torch

from .merging import MERGE_POLICIES
from .scorers import MERGING, SCORERS, TOWER_NEEDS, chooses, registered_at, scorer_arguments


NEWLINE_POLICIES = ("all", "row", "last")
TILE_POLICIES = ("all", "base", "where_needed")
FRAME_POLICIES = ("all", "where_needed")
ORIGIN = "score_from"


@dataclass(frozen=True)
class PruningConfig:
    """Everything that decides which visual tokens a model keeps. Immutable; saved as a plain dict in the model's
    config.

    Args:
        keep_ratio (`float`, *optional*): share of the scored tokens of each image to keep, in (0, 1].
        threshold (`float`, *optional*): keep tokens whose score is below it (a cosine for `score="cosine"`). Give
            exactly one of `keep_ratio` and `threshold`. Above 1, a cosine threshold keeps everything.
        score (`str`, defaults to `"cosine"`): how redundant a token is, a key of [`SCORERS`]: by the codebook
            `"cosine"`, `"softmax"`, `"double_softmax"`, `"codebook_dpp"`, `"codebook_coverage"`; without one
            `"random"`, `"cls_similarity_low"`, `"cls_similarity_high"`, `"diversity"`, and of other papers
            `"cls_attention"`, `"visionzip"`, `"vispruner"`, `"prumerge"`, `"scope"`, `"cdpruner"`, `"tome"`; or one of
            your own, see [`register_scorer`].
        merge (`str`, defaults to `"none"`): what becomes of tokens that are dropped: `"none"`, nothing; `"nearest"`,
            each is averaged into the kept token nearest to it by cosine. Which tokens stay, and where, is the same.
            Rules that merge by themselves (`"visionzip"`, `"prumerge"`, `"tome"`) do so under `"none"`; `"nearest"`
            takes the place of that.
        min_tokens (`int`, defaults to 1): fewest scored tokens kept per image (per frame with `per_frame`), whatever
            the threshold says.
        newlines (`str`, defaults to `"all"`): which row-end tokens stay: `"all"`; `"row"`, those of rows that keep a
            patch (the count then depends on the content); `"last"`, one per image. Row-end tokens are never scored.
            Marks in text that end the rows of Mistral 3 and Molmo 2 follow it too.
        tiles (`str`, defaults to `"all"`): `"base"` drops the anyres tiles (with their row ends) before the vision
            tower runs, so that only the base image's tokens are scored and counted.
            `"where_needed"` (LLaVA-NeXT, OneVision) encodes the base image first and then those tiles alone on whose
            region of it the rule keeps a token, when it is to keep 0.4 of it at least; tokens of the others are
            dropped, and the number that stays is that of `"all"`.
        frames (`str`, defaults to `"all"`): `"where_needed"` (LLaVA-OneVision, LLaVA-NeXT-Video, Qwen-VL, GLM-4V)
            encodes a video's frame, or temporal patch, only where its pixels differ from those of the last one that was
            encoded; all tokens of the others are dropped, and theirs of the budget goes to those that were. The number
            that stays then depends on the pixels. Needs `keep_ratio`; where that keeps all tokens, all frames are
            encoded.
        keep_positions (`bool`, defaults to `False`): what stays of an image, and the text behind it, has the positions
            that it has in the unpruned prompt; by default gaps close, as upstream. Families with m-RoPE positions
            always keep them.
        per_frame (`bool`, defaults to `True`): score and count each video frame by itself, not the video as a whole.
        seed (`int`, defaults to 0): draw of `score="random"`: a token's score depends on it, on the token's place in
            its image and on the frame, so that an image keeps the same tokens in any batch.
        encode_once (`bool`, defaults to `True`): images, tiles and frames of one call that are equal pixel for pixel
            pass the vision tower once (CLIP and SigLIP towers, outside training). Finding them reads a few pixels of
            each before the tower runs.
        enabled (`bool`, defaults to `True`): `False` makes the model the stock model.

    Raises:
        ValueError: for any setting out of range, in a sentence that names it.
    """

    keep_ratio: float | None = None
    threshold: float | None = None
    score: str = "cosine"
    merge: str = "none"
    min_tokens: int = 1
    newlines: str = "all"
    tiles: str = "all"
    frames: str = "all"
    keep_positions: bool = False
    per_frame: bool = True
    seed: int = 0
    encode_once: bool = True
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
        one_of = {
            "score": SCORERS,
            "merge": MERGE_POLICIES,
            "newlines": NEWLINE_POLICIES,
            "tiles": TILE_POLICIES,
            "frames": FRAME_POLICIES,
        }
        for name, allowed in one_of.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        if self.threshold is not None and chooses(self.score):
            raise ValueError(f"score={self.score!r} chooses a number of tokens and has no threshold: give keep_ratio.")
        if self.threshold is not None and self.frames == "where_needed":
            raise ValueError(
                "frames='where_needed' hands what is left of a budget to other frames, and a threshold has none: give "
                "keep_ratio."
            )
        for name in ("keep_positions", "per_frame", "encode_once", "enabled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; got {getattr(self, name)!r}.")

    @property
    def needs_codebook(self) -> bool:
        return "unit_prototypes" in scorer_arguments(self.score)

    @property
    def needs_cls_similarity(self) -> bool:
        return "cls_similarity" in scorer_arguments(self.score)

    @property
    def needs_of_tower(self) -> list[str]:
        """What the scorer reads of the vision tower, beside the tokens."""
        return [name for name in TOWER_NEEDS if name in scorer_arguments(self.score)]

    @property
    def needs_question(self) -> bool:
        return "question" in scorer_arguments(self.score)

    @property
    def merges(self) -> bool:
        """Whether tokens that stay take in those that are dropped."""
        return self.merge != "none" or self.score in MERGING

    def count_of(self, num_tokens: int) -> int | None:
        """How many of `num_tokens` scored tokens stay; None under a threshold, which looks at them."""
        return None if self.keep_ratio is None else kept_token_count(num_tokens, self.keep_ratio, self.min_tokens)

    def to_dict(self) -> dict[str, Any]:
        """JSON types. A registered score comes with `score_from`, the place of its function."""
        origin = registered_at(self.score)
        return asdict(self) if origin is None else {**asdict(self), ORIGIN: origin}

    @classmethod
    def from_dict(cls, settings: dict[str, Any] | PruningConfig) -> PruningConfig:
        """The settings in a saved config. Unknown keys raise: a newer version's setting must not be ignored in
        silence. So does a score that was registered where they were saved and is not here, with what to import."""
        if isinstance(settings, cls):
            return settings
        if not isinstance(settings, dict):
            raise ValueError(f"Pruning settings must be a PruningConfig or a dict, got {type(settings).__name__}.")
        settings = dict(settings)
        origin, score = settings.pop(ORIGIN, None), str(settings.get("score"))
        if origin is not None and score not in SCORERS:
            module, _, name = str(origin).partition(":")
            raise ValueError(
                f"score={score!r} was registered where these settings were saved and is not here: import {module}, "
                f"or call register_scorer({score!r}, …) with its function {name}, before loading."
            )
        if origin is not None and origin != (here := registered_at(str(score))):
            raise ValueError(
                f"score={score!r} was {origin} where these settings were saved, and is {here} here: another rule "
                "under its name. Register that one."
            )
        if unknown := sorted(set(settings) - {field.name for field in fields(cls)}):
            raise ValueError(
                f"Unknown pruning setting(s) {', '.join(unknown)}: a typo, or saved by a newer version of "
                "transformers_rbl: upgrade it."
            )
        return cls(**settings)


def kept_token_count(num_tokens: int, keep_ratio: float, min_tokens: int = 1) -> int:
    """How many of `num_tokens` scored tokens a keep ratio leaves: `round(num_tokens * keep_ratio)`, at least
    `min_tokens`, at most all. The only place that rounds; the model, serving and docs all ask here."""
    return min(num_tokens, max(min_tokens, round(num_tokens * keep_ratio)))


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
    threshold = math.inf if pruning.threshold is None else pruning.threshold  # neither: switched off, and all stay
    # ~(>=) and not (<), so that NaN stays.
    return (~(scores >= threshold)).index_fill_(0, ranked[: pruning.min_tokens], True)
