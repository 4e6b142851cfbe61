"""Which setting to use: the threshold for a retention, or the lowest retention that keeps an accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin

from ..inputs import image_arguments, image_runs
from ..models.codebook import RedundancyCodebook
from ..models.features_rbl import RBLModelMixin
from ..models.generation_rbl import RBLGenerationMixin
from ..models.layout import VisualLayout
from ..models.pruning import PruningConfig, select_tokens
from ..models.scorers import score_tokens
from ..models.seam import TOKENS
from .evaluate import OFF, prompt_inputs
from .metrics import paired_ratio_interval
from .questions import Question
from .results import RuleResult, unpruned


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
    model: RBLGenerationMixin, processor: ProcessorMixin, images: Iterable[Image.Image], score: str = "cosine"
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
        ValueError: for a score that has no threshold to find, or that needs a codebook or [cls] token which is missing.
    """
    rule = PruningConfig(threshold=0, score=score)
    headless = model.model
    _check_scored(headless, rule)
    scores = []
    for image in images:
        inputs = prompt_inputs(processor, Question([image], "What is shown?", []), "", model.device, model.dtype)
        arguments, runs = image_arguments(model, inputs), image_runs(model, inputs["input_ids"])
        tower = headless.family.tower_arguments(rule)
        outputs = headless.get_image_features(**arguments, **tower, pruning=OFF, return_dict=True)
        family = headless.family
        entries = family.grouped(family.split(headless.config, list(outputs[TOKENS])), [runs])
        layouts = headless.layouts(**arguments) or [VisualLayout.of_patches(len(tokens)) for tokens in entries]
        needs = headless.scorer_inputs("image", outputs, rule, arguments, list(map(len, layouts)))
        parts = []
        for tokens, layout, own in zip(entries, layouts, needs, strict=True):
            scored = layout.scored(rule).to(tokens.device)
            own = {name: value.to(tokens.device)[scored] for name, value in own.items()}
            parts.append(_scores(headless.codebook, tokens[scored], rule, own))
        scores.append(torch.cat(parts).cpu())
    return scores


def _check_scored(headless: RBLModelMixin, rule: PruningConfig) -> None:
    """Before any image is encoded."""
    if rule.score == "random":
        raise ValueError("score='random' is uniform in [0, 1): the retention itself is its threshold.")
    if rule.needs_question:
        raise ValueError(f"score={rule.score!r} reads the question: a threshold for all questions means nothing to it.")
    if rule.needs_codebook and headless.codebook is None:
        raise ValueError(f"score={rule.score!r} compares with a codebook, and this model has none: give codebook=.")
    if rule.needs_cls_similarity and not headless.has_cls:
        raise ValueError(f"score={rule.score!r} needs a vision tower with a [cls] token: choose another score.")


def _scores(
    codebook: RedundancyCodebook | None, tokens: torch.Tensor, rule: PruningConfig, own: dict[str, torch.Tensor]
) -> torch.Tensor:
    if codebook is not None and rule.needs_codebook:
        scores = codebook.score(tokens, rule.score, **own)
    else:
        scores = score_tokens(rule.score, tokens=tokens, **own)
    assert isinstance(scores, torch.Tensor)  # a rule that chooses has no threshold, as PruningConfig says
    return scores


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
