"""How a codebook is built, as data: every constant of the procedure (arXiv 2503.20540), read from YAML."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml


PROMPT = "What does this image show? You must provide a single word that best describes the image."
# Upstream's 96 of 576 patches: first and last rank of each stratum, by cosine with [cls], highest first.
UPSTREAM_RANKS = (
    (1, 24),
    (37, 44),
    (73, 80),
    (145, 152),
    (217, 224),
    (289, 296),
    (361, 368),
    (433, 440),
    (505, 512),
    (569, 576),
)
TARGETS = {"cls_rank": "ranks", "positions": "positions", "stride": "stride", "all": None}
CHOICES = {
    "replacement": ("pad", "mean", "remove"),
    "divergence": ("upstream", "jensen_shannon"),
    "thresholds": ("absolute", "quantile"),
}
# Settings that decide which prototypes are selected from probe records, and may change without probing again.
SELECTION = (
    "divergence",
    "thresholds",
    "max_p1",
    "max_divergence",
    "local_weight",
    "global_weight",
    "image_clusters",
    "max_cluster_size",
    "prototype_clusters",
    "min_unique_images",
    "nearest_neighbours",
    "tokens_per_cluster",
    "seed",
)
LOWEST = {
    "num_images": 1,
    "held_out_images": 0,
    "pad_token_id": 0,
    "skip_articles": 0,
    "top_k_p1": 1,
    "top_k_divergence": 2,
    "image_clusters": 1,
    "max_cluster_size": 1,
    "prototype_clusters": 1,
    "min_unique_images": 0,
    "nearest_neighbours": 1,
    "tokens_per_cluster": 1,
    "seed": 0,
}
OPTIONAL = {"num_images", "pad_token_id", "max_cluster_size", "tokens_per_cluster"}


@dataclass(frozen=True)
class Recipe:
    """Constants of a build; the defaults are upstream's for LLaVA-1.5-7B, all but the image count.

    Args:
        prompt (`str`): the question asked about every image.
        num_images (`int`, *optional*): how many images to probe; None takes all that are given.
        held_out_images (`int`, defaults to 8): images of these that are not probed, for the report's retention curve;
            at most a tenth of them.
        targets (`dict`): which of an image's base tokens are probed: `{"by": "cls_rank", "ranks": [[first, last], …]}`
            (ranks from 1, by cosine with the vision tower's [cls], highest first), `{"by": "positions", "positions":
            […]}` (from 0), `{"by": "stride", "stride": k}` or `{"by": "all"}`.
        replacement (`str`): what a left-out token becomes: `"pad"`, the word embedding of `pad_token_id` (upstream);
            `"mean"`, the image's mean visual token; `"remove"`, nothing: it leaves the sequence.
        pad_token_id (`int`, *optional*): None takes the model's.
        skip_articles (`int`): the first answer token is the one after so many bare articles at most.
        top_k_p1 (`int`): p1 is the largest probability of a soft-max over so many logits.
        top_k_divergence (`int`): the divergence compares so many logits.
        divergence (`str`): `"upstream"` or `"jensen_shannon"`, see [`answer_divergence`].
        thresholds (`str`): `"absolute"`, or `"quantile"`: `max_p1` and `max_divergence` are shares of the probed
            tokens.
        max_p1, max_divergence (`float`): a low-information token has p1 and divergence below these (t_p and t_d).
        local_weight, global_weight (`float`): its divergence is local_weight * D_local + global_weight * D_global.
        image_clusters (`int`): clusters per image.
        max_cluster_size (`int`, *optional*): low-information tokens of clusters with at most so many members stay;
            None leaves this rule out.
        prototype_clusters (`int`): clusters over all images.
        min_unique_images (`int`): clusters drawn from so many distinct images or fewer are dropped.
        nearest_neighbours (`int`): k of DPC-KNN.
        tokens_per_cluster (`int`, *optional*): how many tokens the codebook keeps of each cluster, drawn by `seed`;
            None keeps all.
        seed (`int`): of that draw.

    Raises:
        ValueError: for any value out of range, in a sentence that names it.
    """

    prompt: str = PROMPT
    num_images: int | None = None
    held_out_images: int = 8
    targets: dict[str, Any] = field(
        default_factory=lambda: {"by": "cls_rank", "ranks": [list(stratum) for stratum in UPSTREAM_RANKS]}
    )
    replacement: str = "pad"
    pad_token_id: int | None = None
    skip_articles: int = 1
    top_k_p1: int = 50
    top_k_divergence: int = 10
    divergence: str = "upstream"
    thresholds: str = "absolute"
    max_p1: float = 0.15
    max_divergence: float = 2e-3
    local_weight: float = 1.0
    global_weight: float = 16.0
    image_clusters: int = 8
    max_cluster_size: int | None = 8
    prototype_clusters: int = 64
    min_unique_images: int = 64
    nearest_neighbours: int = 5
    tokens_per_cluster: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt must be a question, got {self.prompt!r}.")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}.")
        for name, least in LOWEST.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            if not _is_integer(value, least):
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
        for name in ("max_p1", "max_divergence", "local_weight", "global_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0; got {value!r}.")
            if self.thresholds == "quantile" and name.startswith("max_") and value > 1:
                raise ValueError(f"{name} is a quantile, in [0, 1]; got {value!r}.")
        _check_targets(self.targets)

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Recipe:
        """A recipe from a YAML file, or the preset of that name (a folder of `codebooks/`).

        Raises:
            OSError: if there is no such file or preset.
            ValueError: for unknown keys or bad values; the message names the file.
        """
        path = Path(name_or_path)
        if not path.is_file():
            known = presets()
            if str(name_or_path) not in known:
                raise OSError(f"{name_or_path} is neither a recipe file nor a preset ({', '.join(sorted(known))}).")
            path = known[str(name_or_path)]
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            return cls.from_dict(values)
        except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{path} is no recipe: {' '.join(str(error).split())}") from error

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        if not isinstance(values, dict):
            raise ValueError(f"A recipe is a mapping of settings, got {type(values).__name__}.")
        if unknown := sorted(set(values) - {item.name for item in fields(cls)}):
            raise ValueError(f"Unknown recipe setting(s) {', '.join(map(str, unknown))}.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def target_positions(self, num_tokens: int, cls_similarity: torch.Tensor | None = None) -> torch.Tensor:
        """Positions `(T,)` of the tokens to probe among an image's `num_tokens`, ascending.

        Args:
            num_tokens (`int`): tokens of the base image.
            cls_similarity (`torch.Tensor` of shape `(num_tokens,)`, *optional*): needed by `cls_rank`.

        Raises:
            ValueError: if a rank or position lies beyond the image, or similarities are needed and absent.
        """
        by = self.targets["by"]
        if by == "all":
            return torch.arange(num_tokens)
        if by == "stride":
            return torch.arange(0, num_tokens, self.targets["stride"])
        if by == "positions":
            chosen, what = torch.tensor(self.targets["positions"]), "position"
            beyond = int(chosen.max()) >= num_tokens
        else:
            spans = [torch.arange(first - 1, last) for first, last in self.targets["ranks"]]
            chosen, what = torch.cat(spans), "rank"
            beyond = int(chosen.max()) >= num_tokens
        if beyond:
            raise ValueError(
                f"The recipe probes {what} {int(chosen.max()) + (what == 'rank')}, but an image has {num_tokens} "
                'tokens here: give other targets, for instance {"by": "stride", "stride": 6}.'
            )
        if by == "cls_rank":
            if cls_similarity is None:
                raise ValueError(
                    "The recipe ranks targets by similarity to the vision tower's [cls] token, and this tower has "
                    'none: give targets by "positions", "stride" or "all".'
                )
            chosen = cls_similarity.cpu().argsort(descending=True, stable=True)[chosen]
        return chosen.sort().values


def shipped_folders() -> list[Path]:
    """The folders of `codebooks/` that are at hand: of the installed package, or of the checkout that it runs in."""
    package = Path(__file__).parents[1]
    for parent in (package, package.parents[1]):
        if (parent / "codebooks").is_dir():
            return sorted(path for path in (parent / "codebooks").iterdir() if path.is_dir())
    return []


def presets() -> dict[str, Path]:
    """Recipe files by name: every folder of `codebooks/` with a recipe is a preset, and nothing else lists them."""
    return {folder.name: folder / "recipe.yaml" for folder in shipped_folders() if (folder / "recipe.yaml").is_file()}


def _check_targets(targets: dict[str, Any]) -> None:
    if not isinstance(targets, dict) or targets.get("by") not in TARGETS:
        raise ValueError(f"targets must say by: {', '.join(TARGETS)}; got {targets!r}.")
    key = TARGETS[targets["by"]]
    if set(targets) - {"by"} != ({key} if key else set()):
        raise ValueError(f"targets by {targets['by']} take {key or 'nothing'} besides; got {targets!r}.")

    value = targets[key] if key else None
    if key == "stride" and not _is_integer(value, 1):
        raise ValueError(f"stride must be an integer of at least 1; got {value!r}.")
    if key == "positions":
        if not isinstance(value, list) or not value or not all(_is_integer(v, 0) for v in value):
            raise ValueError(f"positions must be a list of integers from 0; got {value!r}.")
        _check_distinct(key, value, value)
    if key == "ranks":
        if not isinstance(value, list) or not value or not all(map(_is_span, value)):
            raise ValueError(f"ranks must be pairs [first, last] from 1; got {value!r}.")
        _check_distinct(key, value, [rank for first, last in value for rank in range(first, last + 1)])


def _is_span(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and _is_integer(value[0], 1)
        and _is_integer(value[1], value[0])
    )


def _check_distinct(key: str, value: list[Any], numbers: list[int]) -> None:
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{key} name a token twice: {value!r}.")


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
