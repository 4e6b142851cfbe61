"""Accuracy against retention: many pruning rules on one pass over the images."""

from __future__ import annotations

import itertools
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
    batch_size: int = 1,
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
        batch_size (`int`, defaults to 1): questions answered side by side. Prefills are timed one by one whatever it
            is, of the first questions.

    Returns:
        `tuple[list[RuleResult], list[list[str]]]`: results, the unpruned model first, and every question's answers.

    Raises:
        ValueError: if there are no questions, or one has no image or no answer; for batches that cannot be padded.
    """
    if batch_size < 1:
        raise ValueError(f"A batch holds one question at least; got batch_size={batch_size}.")
    every_rule = [OFF, *rules]
    results = [RuleResult(describe_pruning(rule), rule.to_dict()) for rule in every_rule]
    kept: list[list[int]] = [[] for _ in results]
    prefill_ms: list[list[float]] = [[] for _ in results]
    cache_mib: list[list[float]] = [[] for _ in results]
    retained: list[list[float]] = [[] for _ in results]
    references: list[list[str]] = []
    waiting = iter(questions)
    while batch := list(itertools.islice(waiting, batch_size)):
        for question in batch:
            if not question.answers:
                raise ValueError(f"The question {question.text!r} has no answer to compare with.")
        prompts = EncodedPrompts(model, processor, batch, suffix, rules)
        timed = batch[: max(0, TIMED_QUESTIONS - len(references))]
        alone = [prompts] if len(batch) == 1 else [EncodedPrompts(model, processor, [q], suffix, rules) for q in timed]
        references += [question.answers for question in batch]
        for place, rule in enumerate(every_rule):
            for single in alone[: len(timed)]:
                seconds, size, _ = timed_prefill(model, **single.pruned(rule)[0])
                prefill_ms[place].append(seconds * 1e3)
                cache_mib[place].append(size / 2**20)
            prompt, stay = prompts.pruned(rule)
            kept[place] += [int(row.sum()) for row in stay]
            retained[place] += [float(row[scored].float().mean()) for row, scored in zip(stay, prompts.scored)]
            ids = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
            answers = processor.batch_decode(ids[:, prompts.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            results[place].answers += [answer.strip() for answer in answers]
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


class EncodedPrompts:
    """Questions through the vision tower once, side by side, for any number of rules.

    Args:
        model (`RBLGenerationMixin`): in eval mode.
        processor (`ProcessorMixin`): the checkpoint's.
        questions (`Sequence[Question]`): with images.
        suffix (`str`): added to every question.
        rules (`Sequence[PruningConfig]`): that will be asked for: some read more of the tower than others.

    Attributes:
        inputs (`BatchFeature`): of the processor, padded on the left.
        scored (`list[torch.BoolTensor]`): per prompt `(n,)`, which of its visual tokens rules score; row ends are not.
    """

    def __init__(
        self,
        model: RBLGenerationMixin,
        processor: ProcessorMixin,
        questions: Sequence[Question],
        suffix: str,
        rules: Sequence[PruningConfig],
    ):
        self.model = model
        self.inputs = batch_inputs(processor, questions, suffix, model.device, model.dtype)
        self.images, self.runs = image_arguments(model, self.inputs), image_runs(model, self.inputs["input_ids"])
        tower = {name: value for rule in rules for name, value in model.family.tower_arguments(rule).items()}
        self.outputs = model.base_model.get_image_features(**self.images, **tower, pruning=OFF, return_dict=True)
        self.texts = model.prompt_texts("image", Call.read(dict(self.inputs)))
        self.lengths = (self.inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
        layouts = model.model.layouts(**self.images)
        scored = [torch.ones(sum(self.runs))] if layouts is None else [layout.scored(OFF) for layout in layouts]
        self.scored = self._by_prompt(scored)

    def pruned(self, rule: PruningConfig) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Arguments of `forward` or `generate` under a rule, and per prompt `(n,)` which visual tokens stay."""
        features = self.model.model.prune_image_features(self.outputs, rule, [self.runs], self.texts, **self.images)
        masks = features.get(MASKS["image"])
        stay = [torch.ones(sum(self.runs))] if masks is None else list(masks)
        return inputs_with_features(self.model, self.inputs, features), self._by_prompt(stay)

    def _by_prompt(self, masks: list[torch.Tensor]) -> list[torch.Tensor]:
        """Masks of images, in order, as masks of prompts."""
        return list(torch.cat([mask.cpu() for mask in masks]).bool().split(self.lengths))


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
    """What a model takes to answer a question, see [`batch_inputs`]."""
    return batch_inputs(processor, [question], suffix, device, dtype)


def batch_inputs(
    processor: ProcessorMixin,
    questions: Sequence[Question],
    suffix: str,
    device: torch.device | str,
    dtype: torch.dtype,
) -> BatchFeature:
    """What a model takes to answer questions: the images of each first, or where `<image>` stands in its text.

    Args:
        processor (`ProcessorMixin`): the checkpoint's; its chat template makes the prompts, if it has one.
        questions (`Sequence[Question]`): images and text.
        suffix (`str`): added to the text.
        device (`torch.device` or `str`), dtype (`torch.dtype`): of the tensors; ids keep their own type.

    Returns:
        `BatchFeature` of a batch of prompts, padded on the left.

    Raises:
        ValueError: if there is no image, or a text has placeholders, but not as many as images; for several questions,
            if the tokenizer has no token to pad with.
    """
    for question in questions:
        if not question.images:
            raise ValueError(f"The question {question.text!r} comes with no image: there is nothing to prune.")
    prompts = [
        prompt_text(processor, f"{question.text} {suffix}".strip(), len(question.images)) for question in questions
    ]
    padding: dict[str, Any] = {}
    if len(questions) > 1:
        tokenizer = getattr(processor, "tokenizer", None)
        if getattr(tokenizer, "pad_token", None) is None:
            raise ValueError("The tokenizer has no token to pad with, so questions are asked one by one: batch size 1.")
        padding = {"padding": True, "padding_side": "left"}
    images = [question.images for question in questions]
    # The base class declares its options as one nested dict; every processor takes them by name.
    inputs = processor(images=images, text=prompts, return_tensors="pt", **padding)  # pyright: ignore[reportCallIssue]
    return inputs.to(device, dtype)
