"""Every rule that says which visual tokens are redundant, one function each; its argument names say what it needs.

A scorer returns `(L,)` float32, higher is more redundant, or a [`Choice`] (then its return annotation says so, and it
takes no threshold), from any of these arguments:

- `tokens` (L, d): the visual tokens, float32;
- `unit_prototypes` (n, d): the codebook's, of unit length;
- `cls_similarity` (L,): cosines of the vision tower's patches with its [cls] token, at the selected layer;
- `cls_attention` (L,): attention that each patch receives from [cls] in that layer, or from all patches where the tower
  has no [cls], heads averaged;
- `tower_keys` (L, heads, h): the patches' keys in that layer;
- `question` (m, d): the language model's embeddings of the text in the image's prompt;
- `count`: how many will be kept (None under a threshold); `seed`; `frame`, the number of a video's frame.

Rules of several images at once (`@over_images`) take every tensor with one more dimension in front.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .greedy import cosine_matrix, greedy_coverage, greedy_dpp, over_images
from .greedy import greedy_diversity as farthest_first
from .merging import Choice
from .published import attended, cdpruner, prumerge, scope, tome, visionzip, vispruner


TOWER_NEEDS = ("cls_similarity", "cls_attention", "tower_keys")  # a value per token each
NEEDS = ("tokens", "unit_prototypes", *TOWER_NEEDS, "question", "count", "seed", "frame")

Scorer = Callable[..., Any]


# --- the codebook's rules ---------------------------------------------------------------------------------------------


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
    if tokens.device.type == "cpu":  # a product that stays in the cache is up to a third faster
        rows = min(rows, 1024)
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


@over_images
def codebook_dpp(tokens: torch.Tensor, unit_prototypes: torch.Tensor, count: int | None) -> torch.Tensor:
    """Drops what is redundant by nature and what is redundant beside a token that stays: greedy MAP of a determinantal
    point process of kernel q_i c_ij q_j, with c the cosines of the tokens and the quality q_i = 1 - s_i, s_i = max_j
    cos(x_i, p_j) the paper's score, see [`greedy.greedy_dpp`]. Half of it is used, so that it is at most 1: a factor
    that all share changes no choice.

    CDPruner's objective (arXiv 2506.10967, section 3.3) with the codebook in the place of the question.

    Args:
        tokens (`torch.Tensor` of shape `(images, L, d)`): float32.
        unit_prototypes (`torch.Tensor` of shape `(images, n, d)`): of unit length; one codebook, expanded.
        count (`int`, *optional*): how many are chosen; None: all.

    Returns:
        `torch.Tensor` of shape `(images, L)`: from -1 (chosen first) to 1, infinite beyond `count`.
    """
    return greedy_dpp(tokens, _quality(tokens, unit_prototypes), _all(tokens, count))


@over_images
def codebook_coverage(tokens: torch.Tensor, unit_prototypes: torch.Tensor, count: int | None) -> torch.Tensor:
    """Keeps tokens that stand for the informative ones: facility location, sum_i q_i max_{kept j} cos(x_i, x_j), with
    the quality q of [`codebook_dpp`], see [`greedy.greedy_coverage`].

    Args:
        tokens (`torch.Tensor` of shape `(images, L, d)`): float32.
        unit_prototypes (`torch.Tensor` of shape `(images, n, d)`): of unit length; one codebook, expanded.
        count (`int`, *optional*): how many are chosen; None: all.

    Returns:
        `torch.Tensor` of shape `(images, L)`: from -1 (chosen first) to 1, infinite beyond `count`.
    """
    quality = _quality(tokens, unit_prototypes)
    cosines = cosine_matrix(tokens)
    return greedy_coverage(cosines, quality, torch.ones_like(quality), _all(tokens, count))


# --- rules without a codebook -----------------------------------------------------------------------------------------


def random_scores(tokens: torch.Tensor, seed: int, frame: int) -> torch.Tensor:
    """Uniform in [0, 1): the baseline that any rule has to beat (upstream's `random_patch`)."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + frame)
    return torch.rand(len(tokens), generator=generator).to(tokens.device, non_blocking=True)


def low_cls_similarity(cls_similarity: torch.Tensor) -> torch.Tensor:
    """Keeps the patches least similar to the vision tower's [cls] token (upstream's `low_sim_patch`)."""
    return cls_similarity


def high_cls_similarity(cls_similarity: torch.Tensor) -> torch.Tensor:
    """Keeps the patches most similar to the vision tower's [cls] token (upstream's `high_sim_patch`)."""
    return -cls_similarity


@over_images
def greedy_diversity(tokens: torch.Tensor, count: int | None) -> torch.Tensor:
    """Greedy max-min diversity, DivPrune's rule (arXiv 2503.02175, algorithm 1), see [`greedy.greedy_diversity`].

    A token's score is its largest cosine with the tokens chosen before it (-1 for the first), which never falls from
    one choice to the next: the `count` lowest scores are the first `count` choices, and a threshold t keeps choosing
    until every other token is within t of a chosen one. Beyond `count` (None: all) scores are infinite.

    Args:
        tokens (`torch.Tensor` of shape `(images, L, d)`): float32.
        count (`int`, *optional*): how many are chosen; None: all.
    """
    return farthest_first(cosine_matrix(tokens), _all(tokens, count))


SCORERS: dict[str, Scorer] = {
    "cosine": max_cosine,
    "softmax": max_softmax,
    "double_softmax": max_double_softmax,
    "codebook_dpp": codebook_dpp,
    "codebook_coverage": codebook_coverage,
    "random": random_scores,
    "cls_similarity_low": low_cls_similarity,
    "cls_similarity_high": high_cls_similarity,
    "diversity": greedy_diversity,
    "cls_attention": attended,
    "visionzip": visionzip,
    "vispruner": vispruner,
    "prumerge": prumerge,
    "scope": scope,
    "cdpruner": cdpruner,
    "tome": tome,
}
BUILT_IN = frozenset(SCORERS)
MERGING = frozenset({"visionzip", "prumerge", "tome"})  # those whose choice comes with weights


def register_scorer(name: str, function: Scorer) -> None:
    """Make a rule of your own a value of `PruningConfig(score=…)`.

    Args:
        name (`str`): what it is called in settings; letters, digits and underscores.
        function (`Callable`): a scorer, defined in a module by a name of its own (no lambda, nothing within a
            function). Its argument names are its needs, see [`SCORERS`]: those that are known there are supplied, with
            a default or without. It returns `(L,)` float, higher is more redundant, or, annotated so, a [`Choice`].
            Settings that are saved with it record where it was defined, and refuse to load until that module is
            imported (and registers it).

    Raises:
        ValueError: for a name that is taken, or is no name; for a function that has none by which it could be found
            again; for an argument that nothing supplies; for a rule of several images that asks for `frame`, or returns
            a `Choice`.
        TypeError: if `function` is not callable.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"A scorer's name is letters, digits and underscores; got {name!r}.")
    if not callable(function):
        raise TypeError(f"A scorer is a function; {name!r} is a {type(function).__name__}.")
    if name in BUILT_IN:
        raise ValueError(f"{name!r} is a rule of this library: register yours under another name.")
    if "<" in _origin(function):
        raise ValueError(
            f"The scorer {name!r} is {_origin(function)}, which saved settings could not tell from another: define it "
            "by a name of its own, outside of functions."
        )
    if name in SCORERS and _origin(SCORERS[name]) != _origin(function):  # a module that is loaded again may do so
        raise ValueError(f"{name!r} is registered already, as {_origin(SCORERS[name])}: choose another name.")
    if unknown := sorted(_needs(function) - set(NEEDS)):
        raise ValueError(
            f"The scorer {name!r} asks for {', '.join(unknown)}; what a scorer can be given is {', '.join(NEEDS)}."
        )
    if getattr(function, "over_images", False) and ("frame" in _needs(function) or _chooses(function)):
        raise ValueError(
            f"The scorer {name!r} takes several images at once: it has no frame of its own, and returns scores "
            "(images, L). Leave @over_images away."
        )
    SCORERS[name] = function


def registered_at(score: str) -> str | None:
    """`module:name` of the function of a registered rule, for settings that are saved; None for the library's own."""
    return None if score in BUILT_IN or score not in SCORERS else _origin(SCORERS[score])


def scorer_arguments(score: str) -> set[str]:
    """Names of what a scorer needs, by its signature."""
    return _needs(_scorer(score))


def chooses(score: str) -> bool:
    """Whether a scorer returns a [`Choice`], by its annotation, and so takes no threshold."""
    return _chooses(_scorer(score))


def score_tokens(score: str, **inputs: Any) -> torch.Tensor | Choice:
    """What a scorer says of one image's (or frame's) tokens, in float32 and under no autocast.

    Args:
        score (`str`): a key of [`SCORERS`].
        inputs: whatever is at hand of a scorer's arguments, see [`SCORERS`]; None counts as absent for tensors.

    Returns:
        Scores `(L,)` float32, or a [`Choice`].

    Raises:
        ValueError: if the scorer does not exist, or needs something that is absent.
    """
    if not getattr(_scorer(score), "over_images", False):
        return _call(score, inputs)
    several = {name: value[None] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    return _apart(score, _call(score, several), 1)[0]


def score_images(score: str, images: list[dict[str, Any]]) -> list[torch.Tensor | Choice]:
    """What a scorer says of several images, or frames, whose inputs have one shape; at once if it can.

    Args:
        score (`str`): a key of [`SCORERS`].
        images (`list[dict]`): for each what [`score_tokens`] takes.
    """
    if len(images) == 1 or not getattr(_scorer(score), "over_images", False):
        return [score_tokens(score, **inputs) for inputs in images]
    together = {name: _together([inputs.get(name) for inputs in images]) for name in images[0]}
    return _apart(score, _call(score, together), len(images))


def _apart(score: str, scores: Any, images: int) -> list[torch.Tensor | Choice]:
    """The scores of each of several images."""
    if not isinstance(scores, torch.Tensor) or scores.ndim == 0 or len(scores) != images:
        got = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(f"score={score!r} takes several images at once and returns scores (images, L); got {got}.")
    return list(scores)


def _scorer(score: str) -> Scorer:
    """The function of a rule; settings that were pickled may come without it."""
    if score not in SCORERS:
        raise ValueError(
            f"score must be one of {', '.join(SCORERS)}; got {score!r}. A rule of your own is registered in every "
            "process, by register_scorer."
        )
    return SCORERS[score]


def _together(values: list[Any]) -> Any:
    """Tensors with one more dimension in front; one that all share is not copied. What is no tensor is the same."""
    if not isinstance(values[0], torch.Tensor):
        return values[0]
    if all(value is values[0] for value in values):
        return values[0].expand(len(values), *values[0].shape)
    return torch.stack(values)


def _call(score: str, inputs: dict[str, Any]) -> Any:
    needed = {name: inputs.get(name) for name in scorer_arguments(score)}
    if absent := sorted(name for name, value in needed.items() if value is None and name != "count"):
        raise ValueError(f"score={score!r} needs {', '.join(absent)}, which this call does not have.")
    # A rule of the user's may read no tensor at all; the tokens say where it runs.
    tensors = [value for value in (*needed.values(), *inputs.values()) if isinstance(value, torch.Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    with torch.no_grad(), torch.autocast(device, enabled=False):  # autocast would turn products to half precision
        given = {k: v.detach().float() if isinstance(v, torch.Tensor) else v for k, v in needed.items()}
        if score not in BUILT_IN:  # a rule of the user's may write on them
            given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        return SCORERS[score](**given)


def _needs(function: Scorer) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name for parameter in parameters if parameter.default is parameter.empty or parameter.name in NEEDS
    }


def _chooses(function: Scorer) -> bool:
    return inspect.signature(function).return_annotation in (Choice, "Choice")


def _origin(function: Scorer) -> str:
    name = getattr(function, "__qualname__", f"<a {type(function).__qualname__}>")
    return f"{getattr(function, '__module__', type(function).__module__)}:{name}"


def _cosines(tokens: torch.Tensor, unit_prototypes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(tokens, dim=-1) @ unit_prototypes.T


def _quality(tokens: torch.Tensor, unit_prototypes: torch.Tensor) -> torch.Tensor:
    """`(images, L)`: half of 1 minus the paper's score, in [0, 1]."""
    scores = [max_cosine(image, prototypes) for image, prototypes in zip(tokens, unit_prototypes)]
    return ((1 - torch.stack(scores)) / 2).clamp(0, 1)


def _all(tokens: torch.Tensor, count: int | None) -> int:
    return tokens.shape[-2] if count is None else count
