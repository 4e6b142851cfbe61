"""Accuracy against retention: many pruning rules on one pass over the images."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..models.pruning import PruningConfig
from .metrics import METRICS, bootstrap_interval, f1, paired_ratio_interval
from .questions import Question
from .timing import timed_prefill


OFF = PruningConfig(enabled=False)
TIMED_QUESTIONS = 8


@dataclass
class RuleResult:
    """What one rule came to.

    Args:
        name (`str`): the rule in words.
        pruning (`dict`): its settings.
        retention (`float`): mean share of visual tokens kept.
        tokens (`float`): mean visual tokens kept a question.
        correct (`dict[str, list[float]]`): per metric, 0 or 1 for each question.
        answers (`list[str]`): what the model said.
        prefill_ms, cache_mib (`float`, *optional*): medians over the first questions.
    """

    name: str
    pruning: dict
    retention: float = 0.0
    tokens: float = 0.0
    correct: dict[str, list[float]] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    prefill_ms: float | None = None
    cache_mib: float | None = None


def rule_name(pruning: PruningConfig) -> str:
    if not pruning.enabled:
        return "unpruned"
    value = f"keep_ratio {pruning.keep_ratio}" if pruning.threshold is None else f"threshold {pruning.threshold}"
    rest = "".join(
        f", {name} {getattr(pruning, name)}" for name in ("tiles", "newlines") if getattr(pruning, name) != "all"
    )
    return f"{pruning.score}, {value}{rest}"


@torch.no_grad()
def evaluate(
    model, processor, questions: Iterable[Question], rules: list[PruningConfig], metrics: list[str],
    max_new_tokens: int = 16, suffix: str = "",
) -> tuple[list[RuleResult], list[list[str]]]:  # fmt: skip
    """Ask every question under every rule, unpruned first. Images are encoded once for all rules.

    Args:
        model (`RBLGenerationMixin`): a full pruned model, in eval mode.
        processor (`ProcessorMixin`): the checkpoint's.
        questions (`Iterable[Question]`): see [`read_questions`].
        rules (`list[PruningConfig]`): beside the unpruned model.
        metrics (`list[str]`): keys of [`METRICS`].
        max_new_tokens (`int`): length of an answer; decoding is greedy.
        suffix (`str`): added to every question, e.g. "Answer with one word."

    Returns:
        `tuple[list[RuleResult], list[list[str]]]`: results, the unpruned model first, and every question's answers.
    """
    results = [RuleResult(rule_name(rule), rule.to_dict()) for rule in (OFF, *rules)]
    kept, whole, seconds, sizes = ([[] for _ in results] for _ in range(4))
    references = []
    for number, question in enumerate(questions):
        inputs = prompt_inputs(processor, question, suffix, model.device, model.dtype)
        text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        visual = {key: inputs[key] for key in inputs if key not in text}
        encoded = model.get_image_features(**visual, pruning=OFF, return_dict=True)
        references.append(question.answers)
        for place, rule in enumerate((OFF, *rules)):
            features = model.model.prune_image_features(encoded, rule, **visual)
            masks = features.get("keep_masks")
            total = sum(len(tokens) for tokens in encoded.pooler_output)
            whole[place].append(total)
            kept[place].append(total if masks is None else sum(int(mask.sum()) for mask in masks))
            if number < TIMED_QUESTIONS:
                spent, size, _ = timed_prefill(model, **text, mm_encoder_outputs={"image": features})
                seconds[place].append(spent * 1e3)
                sizes[place].append(size / 2**20)
            ids = model.generate(
                **text, mm_encoder_outputs={"image": features}, max_new_tokens=max_new_tokens, do_sample=False
            )
            answer = processor.batch_decode(ids[:, text["input_ids"].shape[1] :], skip_special_tokens=True)[0]
            results[place].answers.append(answer.strip())
    if not references:
        raise ValueError("There are no questions to ask.")
    for place, result in enumerate(results):
        result.tokens = float(np.mean(kept[place]))
        result.retention = float(np.mean(np.array(kept[place]) / np.array(whole[place])))
        result.prefill_ms, result.cache_mib = statistics.median(seconds[place]), statistics.median(sizes[place])
        pairs = list(zip(result.answers, references))
        result.correct = {name: [METRICS[name](*pair) for pair in pairs] for name in metrics}
    return results, references


def table_rows(results: list[RuleResult], references: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the results: accuracy with its interval, and the share of the unpruned one with its."""
    metrics = list(results[0].correct)
    columns = ["rule", "retention", "visual tokens"]
    for name in metrics:
        columns += [name, f"{name}, of unpruned"]
    columns += ["yes F1"] if "yes_no" in metrics else []
    columns += ["prefill ms", "KV cache MiB"]
    rows = []
    for result in results:
        row = [result.name, f"{result.retention:.1%}", f"{result.tokens:.1f}"]
        for name in metrics:
            values, base = np.array(result.correct[name]), np.array(results[0].correct[name])
            low, high = bootstrap_interval(values)
            row.append(f"{values.mean():.1%} [{low:.1%}, {high:.1%}]")
            below, above = paired_ratio_interval(values, base)
            share = values.mean() / base.mean() if base.mean() > 0 else float("nan")
            row.append(f"{share:.1%} [{below:.1%}, {above:.1%}]")
        if "yes F1" in columns:
            row.append(f"{f1(result.answers, references):.3f}")
        rows.append([*row, f"{result.prefill_ms:.1f}", f"{result.cache_mib:.2f}"])
    return columns, rows


def write_results(folder: Path, results: list[RuleResult], references: list[list[str]], about: dict) -> None:
    """Write `results.json`, `results.md` and `accuracy.png`."""
    from .plots import plot_accuracy

    folder.mkdir(parents=True, exist_ok=True)
    columns, rows = table_rows(results, references)
    lines = [f"# {about.get('model', '')}", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    (folder / "results.md").write_text("\n".join([*lines, "", "![Accuracy against retention](accuracy.png)", ""]))
    content = {"about": about, "results": [vars(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    plot_accuracy(results, folder / "accuracy.png")


def prompt_inputs(processor, question: Question, suffix: str, device, dtype):
    """What a model takes to answer a question: its images first, or where `<image>` stands in its text.

    Args:
        processor (`ProcessorMixin`): the checkpoint's; its chat template makes the prompt, if it has one.
        question ([`Question`]): images and text.
        suffix (`str`): added to the text.
        device, dtype: of the tensors; ids keep their own type.

    Returns:
        `BatchFeature` of one prompt.

    Raises:
        ValueError: if the text has placeholders, but not as many as images.
    """
    prompt = prompt_text(processor, f"{question.text} {suffix}".strip(), len(question.images))
    return processor(images=[question.images], text=[prompt], return_tensors="pt").to(device, dtype)


def prompt_text(processor, text: str, count: int, modality: str = "image") -> str:
    """A question as a prompt with `count` images or videos: where `<image>` or `<video>` stands in it, or before it.

    Raises:
        ValueError: if the text has placeholders, but not that many.
    """
    placeholder = f"<{modality}>"
    parts = text.split(placeholder)
    if len(parts) == 1:
        parts = [""] * count + parts
    if len(parts) - 1 != count:
        raise ValueError(f"{text!r} has {len(parts) - 1} times {placeholder}, but comes with {count} {modality}s.")
    content = []
    for number, part in enumerate(parts):
        content += [{"type": modality}] * (number > 0) + [{"type": "text", "text": part.strip()}] * bool(part.strip())
    if getattr(processor, "chat_template", None) is None:
        token = getattr(processor, f"{modality}_token")
        return "\n".join(token if item["type"] == modality else item["text"] for item in content)
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
