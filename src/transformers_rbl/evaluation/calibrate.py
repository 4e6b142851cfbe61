"""Which setting to use: the threshold for a retention, or the lowest retention that keeps an accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from ..models.layout import NEWLINE
from ..models.pruning import PruningConfig, select_tokens
from ..models.scorers import score_tokens
from .metrics import paired_ratio_interval
from .pruned_model import PrunedModel
from .results import RuleResult, unpruned


OFF = PruningConfig(enabled=False)
ENCODED = ("pixel_values", "image_sizes", "batch_num_images")  # what image processors return that models encode


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
def image_scores(
    model: PrunedModel, processor: ProcessorMixin, images: Iterable[Image.Image], score: str = "cosine"
) -> list[torch.Tensor]:
    """Scores of every image's tokens, as a threshold meets them.

    Args:
        model (`RBLGenerationMixin`): a full pruned model, in eval mode.
        processor (`ProcessorMixin`): the checkpoint's.
        images (`Iterable[PIL.Image.Image]`): RGB.
        score (`str`, defaults to `"cosine"`): a key of [`SCORERS`].

    Returns:
        `list[torch.FloatTensor]`: per image `(L,)`, row ends left out.

    Raises:
        ValueError: for a score without a threshold to calibrate, or that needs a codebook which the model lacks.
    """
    check_calibrated(score)
    codebook, needs_codebook = model.codebook, PruningConfig(threshold=0, score=score).needs_codebook
    if needs_codebook and codebook is None:
        raise ValueError(f"score={score!r} compares tokens with a codebook, and this model has none: give codebook=.")
    scores = []
    for image in images:
        processed = processor.image_processor(image, return_tensors="pt").to(model.device, model.dtype)
        visual = {name: processed[name] for name in ENCODED if name in processed}
        tokens = model.get_image_features(**visual, pruning=OFF, return_dict=True)["pooler_output"][0]
        kinds = model.model.token_kinds(**visual)[0].to(tokens.device)
        scored = tokens[kinds != NEWLINE]
        if codebook is not None and needs_codebook:
            scores.append(codebook.score(scored, score).cpu())
        else:
            scores.append(score_tokens(score, tokens=scored).cpu())
    return scores


def check_calibrated(score: str) -> None:
    """Whether a threshold on this score can be fitted to images.

    Args:
        score (`str`): a key of [`SCORERS`].

    Raises:
        ValueError: if not, or if there is no such score.
    """
    if score == "random":
        raise ValueError("score='random' is uniform in [0, 1): the retention itself is its threshold.")
    if PruningConfig(threshold=0, score=score).needs_cls_similarity:
        raise ValueError(f"score={score!r} ranks the patches of one image, for a keep_ratio: calibrate another score.")


def mean_retention(scores: Sequence[torch.Tensor], threshold: float, min_tokens: int = 1) -> float:
    """Mean share of an image's scored tokens that a threshold keeps.

    Args:
        scores (`Sequence[torch.Tensor]`): per image `(L,)`, see [`image_scores`].
        threshold (`float`): see [`PruningConfig`].
        min_tokens (`int`, defaults to 1): see [`PruningConfig`].

    Raises:
        ValueError: if there are no images.
    """
    if not scores:
        raise ValueError("There are no images, so there is no retention.")
    rule = PruningConfig(threshold=threshold, min_tokens=min_tokens)
    return float(np.mean([select_tokens(values, rule).float().mean().item() for values in scores]))


def threshold_for(scores: Sequence[torch.Tensor], target: float, seed: int = 0) -> Calibration:
    """The threshold whose mean retention comes nearest to `target`, fitted on half of the images, checked on the rest.

    Args:
        scores (`Sequence[torch.Tensor]`): per image, see [`image_scores`].
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


def lowest_retention(
    results: Sequence[RuleResult], share: float, metric: str
) -> tuple[RuleResult, float, float] | None:
    """Of rules with a keep ratio, the one of lowest retention whose accuracy is at least `share` of the unpruned one.

    Args:
        results (`Sequence[RuleResult]`): of [`evaluate`], the unpruned model first.
        share (`float`): in (0, 1].
        metric (`str`): which accuracy.

    Returns:
        `tuple[RuleResult, float, float]`: the rule's result, and the 95% interval of its share; None if no rule keeps
        so much.

    Raises:
        ValueError: if there are no results, or the unpruned model is never right.
    """
    base = np.array(unpruned(results).correct[metric])
    if base.mean() == 0:
        raise ValueError("The unpruned model answers nothing right, so there is nothing to keep.")
    accurate = [result for result in results[1:] if np.mean(result.correct[metric]) >= share * base.mean()]
    if not accurate:
        return None
    best = min(accurate, key=lambda result: result.retention)
    return best, *paired_ratio_interval(np.array(best.correct[metric]), base)
