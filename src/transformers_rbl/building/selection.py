"""From probe records to prototypes: low-information tokens, rare within their image, common over images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch

from .clustering import dpc_knn
from .recipe import Recipe


BORDER = 1e-5  # closer to a threshold than this, a token's side may depend on batch sizes and devices


class EmptyCodebookError(ValueError):
    """No token met every condition; the message says which one removed the last, and what would leave some."""


@dataclass
class Probe:
    """What was measured of one image's target tokens.

    Args:
        image (`str`): which image.
        positions (`torch.LongTensor` of shape `(T,)`): of the tokens, in the base image.
        tokens (`torch.Tensor` of shape `(T, d)`): the visual tokens.
        p1 (`torch.FloatTensor` of shape `(T,)`): see [`answer_confidence`].
        local, globally (`dict[str, torch.FloatTensor]`): divergences `(T,)` by kind, see [`answer_divergence`].
        words (`list[list[str]]`): the likeliest single words for each token, best first.
        grid (`tuple[int, int]`, *optional*): rows and columns of the image's tokens.
    """

    image: str
    positions: torch.Tensor
    tokens: torch.Tensor
    p1: torch.Tensor
    local: dict[str, torch.Tensor]
    globally: dict[str, torch.Tensor]
    words: list[list[str]]
    grid: tuple[int, int] | None = None


@dataclass
class Selection:
    """Which tokens became prototypes.

    Args:
        image, row (`np.ndarray` of shape `(m,)`): of each prototype, its probe and the row in it.
        cluster (`np.ndarray` of shape `(m,)`): its cluster over all images.
        candidates (`np.ndarray` of shape `(c, 2)`): probe and row of every token that was clustered over images.
        candidate_clusters (`np.ndarray` of shape `(c,)`): their clusters.
        unique_images (`np.ndarray` of shape `(clusters,)`): distinct images in each.
        funnel (`list[tuple[str, int]]`): tokens left after each condition.
        max_p1, max_divergence (`float`): the thresholds in force, absolute.
        borderline (`list[tuple[str, int, str, float]]`): tokens within 1e-5 of a threshold: image, position, which
            threshold, value.
    """

    image: np.ndarray
    row: np.ndarray
    cluster: np.ndarray
    candidates: np.ndarray
    candidate_clusters: np.ndarray
    unique_images: np.ndarray
    funnel: list[tuple[str, int]]
    max_p1: float
    max_divergence: float
    borderline: list[tuple[str, int, str, float]]


def divergence(probe: Probe, recipe: Recipe) -> torch.Tensor:
    """`(T,)`: local_weight * D_local + global_weight * D_global, by the recipe's kind."""
    kind = recipe.divergence
    return recipe.local_weight * probe.local[kind] + recipe.global_weight * probe.globally[kind]


def select_prototypes(probes: list[Probe], recipe: Recipe) -> Selection:
    """The selection of arXiv 2503.20540, in three conditions.

    A token has low information if p1 < max_p1 and its divergence < max_divergence. Per image, all target tokens are
    clustered, and low-information tokens of small clusters stay (`max_cluster_size`). Over all images these are
    clustered again, and clusters from too few distinct images are dropped (`min_unique_images`): what remains says
    nothing in any context.

    Args:
        probes (`list[Probe]`): what was measured, an image each.
        recipe ([`Recipe`]): whose selection settings count.

    Raises:
        EmptyCodebookError: if nothing is left.
    """
    p1 = torch.cat([probe.p1 for probe in probes]).double().numpy()
    change = torch.cat([divergence(probe, recipe) for probe in probes]).double().numpy()
    image = np.repeat(np.arange(len(probes)), [len(probe.positions) for probe in probes])
    row = np.concatenate([np.arange(len(probe.positions)) for probe in probes])
    max_p1, max_change = recipe.max_p1, recipe.max_divergence
    if recipe.thresholds == "quantile":
        max_p1, max_change = float(np.quantile(p1, max_p1)), float(np.quantile(change, max_change))

    quiet = p1 < max_p1
    low = quiet & (change < max_change)
    funnel = [("probed", len(p1)), (f"p1 below {max_p1:.4g}", int(quiet.sum()))]
    if not quiet.any():
        tenth = np.quantile(p1, 0.1)
        advice = f"the lowest p1 is {p1.min():.4g}, a tenth of the tokens is below {tenth:.4g}: raise max_p1"
        _nothing(funnel, f"{advice}, or give thresholds as quantiles")
    funnel.append((f"divergence below {max_change:.4g}", int(low.sum())))
    if not low.any():
        rest = change[quiet]
        advice = f"of these, the lowest divergence is {rest.min():.4g}, a tenth is below {np.quantile(rest, 0.1):.4g}"
        _nothing(funnel, f"{advice}: raise max_divergence, or give thresholds as quantiles")

    if recipe.max_cluster_size is not None:
        sizes = np.concatenate([_cluster_sizes(probe, recipe) for probe in probes])
        small = low & (sizes <= recipe.max_cluster_size)
        funnel.append((f"in clusters of at most {recipe.max_cluster_size} in their image", int(small.sum())))
        if not small.any():
            half = int(np.median(sizes[low]))
            advice = f"the smallest cluster with such a token has {sizes[low].min()} members, half of them are in"
            advice += f" clusters of at most {half}: raise max_cluster_size or image_clusters"
            _nothing(funnel, f"{advice}, or leave the rule out (max_cluster_size: null)")
        low = small

    candidates = np.stack([image[low], row[low]], axis=1)
    points = _rows(probes, candidates).float().numpy()
    labels = dpc_knn(points, recipe.prototype_clusters, recipe.nearest_neighbours)
    clusters = labels.max() + 1
    unique = np.array([len(set(candidates[labels == k, 0])) for k in range(clusters)])
    common = unique[labels] > recipe.min_unique_images
    funnel.append((f"in clusters from more than {recipe.min_unique_images} images", int(common.sum())))
    if not common.any():
        advice = f"the widest cluster comes from {unique.max()} of {len(probes)} images: lower min_unique_images to"
        _nothing(funnel, f"{advice} {max(unique.max() - 1, 0)} or less, or prototype_clusters")

    chosen = np.flatnonzero(common)
    if recipe.tokens_per_cluster is not None:
        random = np.random.default_rng(recipe.seed)
        parts = []
        for k in np.unique(labels[chosen]):
            members = chosen[labels[chosen] == k]
            parts.append(random.permutation(members)[: recipe.tokens_per_cluster])
        chosen = np.sort(np.concatenate(parts))
        funnel.append((f"at most {recipe.tokens_per_cluster} of each cluster", len(chosen)))
    limits = {"p1": (p1, max_p1), "divergence": (change, max_change)}
    return Selection(
        image=candidates[chosen, 0],
        row=candidates[chosen, 1],
        cluster=labels[chosen],
        candidates=candidates,
        candidate_clusters=labels,
        unique_images=unique,
        funnel=funnel,
        max_p1=max_p1,
        max_divergence=max_change,
        borderline=_borderline(probes, image, row, limits),
    )


def prototypes(probes: list[Probe], selection: Selection) -> torch.Tensor:
    """The selected tokens `(m, d)`, in the order of images and positions."""
    return _rows(probes, np.stack([selection.image, selection.row], axis=1))


def _rows(probes: list[Probe], pairs: np.ndarray) -> torch.Tensor:
    return torch.stack([probes[image].tokens[row] for image, row in pairs.tolist()])


def _cluster_sizes(probe: Probe, recipe: Recipe) -> np.ndarray:
    """Members of each token's cluster, within its image."""
    labels = dpc_knn(probe.tokens.float().numpy(), recipe.image_clusters, recipe.nearest_neighbours)
    return np.bincount(labels)[labels]


def _borderline(
    probes: list[Probe], image: np.ndarray, row: np.ndarray, limits: dict[str, tuple[np.ndarray, float]]
) -> list[tuple[str, int, str, float]]:
    """Tokens, the `row`s of probes number `image`, of which a measure lies near its threshold."""
    near = []
    for name, (values, limit) in limits.items():
        for i in np.flatnonzero(np.abs(values - limit) < BORDER).tolist():
            probe = probes[image[i]]
            near.append((probe.image, int(probe.positions[row[i]]), name, float(values[i])))
    return near


def _nothing(funnel: list[tuple[str, int]], advice: str) -> NoReturn:
    steps = " -> ".join(f"{count} {name}" for name, count in funnel)
    raise EmptyCodebookError(f"No prototype is left: {steps}. {advice[0].upper()}{advice[1:]}.")
