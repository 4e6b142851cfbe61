"""Accuracy against retention: many pruning rules on one pass over the images."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from ..inputs import image_arguments, image_runs, inputs_with_features
from ..models.generation_rbl import RBLGenerationMixin
from ..models.pruning import PruningConfig
from ..models.seam import MASKS, Call
from ..prompts import prompt_text
from ..wording import describe_pruning
from .metrics import METRICS
from .questions import Question
from .results import RuleResult, table_rows
from .timing import timed_prefill
from .writing import write_results


__all__ = ["OFF", "RuleResult", "evaluate", "prompt_inputs", "prompt_text", "refusal", "table_rows", "write_results"]

OFF = PruningConfig(enabled=False)
TIMED_QUESTIONS = 8


@torch.no_grad()
def evaluate(
    model: RBLGenerationMixin,
    processor: ProcessorMixin,
    questions: Iterable[Question],
    rules: Sequence[PruningConfig],
    metrics: Sequence[str],
    max_new_tokens: int = 16,
    suffix: str = "",
) -> tuple[list[RuleResult], list[list[str]]]:
    """Ask every question under every rule, unpruned first. Images are encoded once for all rules.

    Args:
        model (`RBLGenerationMixin`): a full pruned model, in eval mode.
        processor (`ProcessorMixin`): the checkpoint's.
        questions (`Iterable[Question]`): see [`read_questions`].
        rules (`Sequence[PruningConfig]`): beside the unpruned model.
        metrics (`Sequence[str]`): keys of [`METRICS`].
        max_new_tokens (`int`): length of an answer; decoding is greedy.
        suffix (`str`): added to every question, e.g. "Answer with one word."

    Returns:
        `tuple[list[RuleResult], list[list[str]]]`: results, the unpruned model first, and every question's answers.

    Raises:
        ValueError: if there are no questions, or one has no image or no answer.
    """
    every_rule = [OFF, *rules]
    results = [RuleResult(describe_pruning(rule), rule.to_dict()) for rule in every_rule]
    kept: list[list[int]] = [[] for _ in results]
    prefill_ms: list[list[float]] = [[] for _ in results]
    cache_mib: list[list[float]] = [[] for _ in results]
    retained: list[list[float]] = [[] for _ in results]
    references: list[list[str]] = []
    for number, question in enumerate(questions):
        if not question.answers:
            raise ValueError(f"The question {question.text!r} has no answer to compare with.")
        inputs = prompt_inputs(processor, question, suffix, model.device, model.dtype)
        images, runs = image_arguments(model, inputs), image_runs(model, inputs["input_ids"])
        tower = {name: value for rule in rules for name, value in model.family.tower_arguments(rule).items()}
        encoded = model.base_model.get_image_features(**images, **tower, pruning=OFF, return_dict=True)
        texts = model.prompt_texts("image", Call.read(dict(inputs)))
        references.append(question.answers)
        layouts = model.model.layouts(**images)
        patches = None if layouts is None else torch.cat([layout.scored(OFF) for layout in layouts])
        for place, rule in enumerate(every_rule):
            features = model.model.prune_image_features(encoded, rule, [runs], texts, **images)
            masks = features.get(MASKS["image"])
            stay = torch.ones(sum(runs), dtype=torch.bool) if masks is None else torch.cat(list(masks)).cpu()
            kept[place].append(int(stay.sum()))
            retained[place].append(float((stay if patches is None else stay[patches.cpu()]).float().mean()))
            prompt = inputs_with_features(model, inputs, features)
            if number < TIMED_QUESTIONS:
                seconds, size, _ = timed_prefill(model, **prompt)
                prefill_ms[place].append(seconds * 1e3)
                cache_mib[place].append(size / 2**20)
            ids = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
            answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
            results[place].answers.append(answer.strip())
    if not references:
        raise ValueError("There are no questions to ask.")
    for place, result in enumerate(results):
        result.tokens = float(np.mean(kept[place]))
        result.retention = float(np.mean(retained[place]))
        result.prefill_ms = statistics.median(prefill_ms[place])
        result.cache_mib = statistics.median(cache_mib[place])
        pairs = list(zip(result.answers, references))
        result.correct = {name: [METRICS[name](*pair) for pair in pairs] for name in metrics}
    return results, references


@torch.no_grad()
def refusal(model: RBLGenerationMixin, inputs: Mapping[str, Any], rule: PruningConfig) -> str | None:
    """Why a model cannot prune by a rule, in its own sentence; None if it can. The rule is tried on one prompt, since
    what a rule needs (a codebook, a [cls] token, the question) is known to the model, and to nobody else.

    Args:
        model (`RBLGenerationMixin`): in eval mode.
        inputs (`Mapping[str, Any]`): of its `forward`: a prompt with an image.
        rule (`PruningConfig`): what to try.
    """
    try:
        model(**inputs, pruning=rule, logits_to_keep=1)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def prompt_inputs(
    processor: ProcessorMixin, question: Question, suffix: str, device: torch.device | str, dtype: torch.dtype
) -> BatchFeature:
    """What a model takes to answer a question: its images first, or where `<image>` stands in its text.

    Args:
        processor (`ProcessorMixin`): the checkpoint's; its chat template makes the prompt, if it has one.
        question ([`Question`]): images and text.
        suffix (`str`): added to the text.
        device (`torch.device` or `str`), dtype (`torch.dtype`): of the tensors; ids keep their own type.

    Returns:
        `BatchFeature` of one prompt.

    Raises:
        ValueError: if there is no image, or the text has placeholders, but not as many as images.
    """
    if not question.images:
        raise ValueError(f"The question {question.text!r} comes with no image: there is nothing to prune.")
    prompt = prompt_text(processor, f"{question.text} {suffix}".strip(), len(question.images))
    # The base class declares its options as one nested dict; every processor takes them by name.
    inputs = processor(images=[question.images], text=[prompt], return_tensors="pt")  # pyright: ignore[reportCallIssue]
    return inputs.to(device, dtype)
