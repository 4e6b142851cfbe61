"""Which setting to use: the threshold for a retention, or the lowest retention that keeps an accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..models.layout import NEWLINE
from ..models.pruning import PruningConfig, select_tokens
from .evaluate import RuleResult
from .metrics import paired_ratio_interval


@dataclass
class Calibration:
    """A threshold, and what it does.

    Args:
        threshold (`float`): for the target.
        target (`float`): mean retention asked for.
        fitted, checked (`float`): mean retention on the images it was fitted on, and on the others.
        images (`tuple[int, int]`): how many of each.
    """

    threshold: float
    target: float
    fitted: float
    checked: float
    images: tuple[int, int]

    @property
    def overshoot(self) -> float:
        """Retention on unseen images beyond the target, in share of tokens; negative if fewer are kept."""
        return self.checked - self.target


@torch.no_grad()
def image_scores(model, processor, images: Iterable[Image.Image], score: str = "cosine") -> list[torch.Tensor]:
    """Scores `(L,)` of every image's scored tokens."""
    rule, off = PruningConfig(keep_ratio=1.0, score=score), PruningConfig(enabled=False)
    found = []
    for image in images:
        visual = processor.image_processor(image, return_tensors="pt").to(model.device, model.dtype)
        names = {"pixel_values", "image_sizes", "batch_num_images"} & set(visual)
        visual = {name: visual[name] for name in names}
        tokens = model.get_image_features(**visual, pruning=off, return_dict=True).pooler_output[0]
        kinds = model.model.token_kinds(**visual)[0].to(tokens.device)
        found.append(model.codebook.score(tokens[kinds != NEWLINE], rule.score).cpu())
    return found


def mean_retention(scores: list[torch.Tensor], threshold: float, min_tokens: int = 1) -> float:
    """Mean share of an image's scored tokens that a threshold keeps."""
    rule = PruningConfig(threshold=threshold, min_tokens=min_tokens)
    return float(np.mean([select_tokens(values, rule).float().mean().item() for values in scores]))


def threshold_for(scores: list[torch.Tensor], target: float, seed: int = 0) -> Calibration:
    """The threshold whose mean retention comes nearest to `target`, fitted on half of the images, checked on the rest.

    Args:
        scores (`list[torch.Tensor]`): per image, see [`image_scores`].
        target (`float`): mean retention, in (0, 1].
        seed (`int`): which half is which.

    Raises:
        ValueError: with fewer than two images, or a target out of range.
    """
    if not 0 < target <= 1:
        raise ValueError(f"The target is a mean retention, in (0, 1]; got {target}.")
    if len(scores) < 2:
        raise ValueError("Calibrating takes two images at least: one to fit on, one to check on.")
    order = np.random.default_rng(seed).permutation(len(scores))
    half = (len(scores) + 1) // 2
    fit, check = [scores[i] for i in order[:half]], [scores[i] for i in order[half:]]
    low, high = -1.01, float(torch.cat(fit).max()) + 1e-3
    for _ in range(40):  # retention never falls as the threshold rises
        middle = (low + high) / 2
        low, high = (middle, high) if mean_retention(fit, middle) < target else (low, middle)
    threshold = min((low, high), key=lambda value: abs(mean_retention(fit, value) - target))
    sizes = (len(fit), len(check))
    return Calibration(threshold, target, mean_retention(fit, threshold), mean_retention(check, threshold), sizes)


def lowest_retention(results: list[RuleResult], share: float, metric: str) -> tuple[RuleResult, float, float] | None:
    """Of rules with a keep ratio, the one of lowest retention whose accuracy is at least `share` of the unpruned one.

    Args:
        results (`list[RuleResult]`): of [`evaluate`], the unpruned model first.
        share (`float`): in (0, 1].
        metric (`str`): which accuracy.

    Returns:
        The rule's result, and the 95% interval of its share; None if no rule keeps so much.
    """
    base = np.array(results[0].correct[metric])
    if base.mean() == 0:
        raise ValueError("The unpruned model answers nothing right, so there is nothing to keep.")
    good = [r for r in results[1:] if np.mean(r.correct[metric]) >= share * base.mean()]
    if not good:
        return None
    best = min(good, key=lambda result: result.retention)
    return best, *paired_ratio_interval(np.array(best.correct[metric]), base)
