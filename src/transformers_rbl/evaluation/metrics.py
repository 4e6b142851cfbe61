"""Was the answer right? Metrics of visual question answering, and intervals."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np


ARTICLES = {"a", "an", "the"}
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the answer is one of the references, spaces around it aside."""
    return float(answer.strip() in {reference.strip() for reference in references})


def normalised(answer: str, references: Sequence[str]) -> float:
    """1 if they are equal in lower case, without punctuation and articles, with number words as digits (the
    normalisation of VQA and of SQuAD)."""
    return float(normalise(answer) in {normalise(reference) for reference in references})


def choice(answer: str, references: Sequence[str]) -> float:
    """1 if the answer's option letter is a reference's: "B", "(b)", "B. a dog", "The answer is B."."""
    letter = option_letter(answer)
    return float(letter is not None and letter in {option_letter(reference) for reference in references})


def yes_no(answer: str, references: Sequence[str]) -> float:
    """1 if both begin with the same of yes and no; see [`f1`] for the F1 of "yes"."""
    said = said_yes(answer)
    return float(said is not None and said == said_yes(references[0]))


METRICS = {"exact": exact, "normalised": normalised, "choice": choice, "yes_no": yes_no}


def normalise(text: str) -> str:
    words = text.lower().translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ARTICLES)


def option_letter(text: str) -> str | None:
    """The option that a text names, in upper case; None if none."""
    text = text.strip()
    at_start = re.match(r"\(?([A-Za-z])(?:[).:,]|\s*$)", text)
    if at_start:
        return at_start.group(1).upper()
    named = re.search(r"(?:answer|option|choice)(?:\s+is|:)?\s*\(?([A-Z])\b", text)
    return named.group(1) if named else None


def said_yes(text: str) -> bool | None:
    """Whether a text begins with yes (True) or no (False); None if with neither."""
    words = normalise(text).split()
    return {"yes": True, "no": False}.get(words[0]) if words else None


def f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """F1 of "yes", as POPE reports it: answers that are neither count as no."""
    said = np.array([said_yes(answer) is True for answer in answers])
    true = np.array([said_yes(reference[0]) is True for reference in references])
    hits = (said & true).sum()
    return float(2 * hits / max(said.sum() + true.sum(), 1))


def bootstrap_interval(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of `values` `(n,)`, by resampling them.

    Raises:
        ValueError: if there are no values.
    """
    values = np.asarray(values, dtype=float)
    means = values[_resampled(len(values), draws, seed)].mean(axis=1)
    return _middle(means)


def paired_ratio_interval(
    values: np.ndarray, baseline: np.ndarray, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of mean(values) / mean(baseline), resampling examples for both at once; NaN where the baseline is
    always 0.

    Raises:
        ValueError: if there are no values.
    """
    values, baseline = np.asarray(values, dtype=float), np.asarray(baseline, dtype=float)
    rows = _resampled(len(values), draws, seed)
    below = baseline[rows].mean(axis=1)
    ratios = values[rows].mean(axis=1)[below > 0] / below[below > 0]
    if len(ratios) == 0:
        return float("nan"), float("nan")
    return _middle(ratios)


def _resampled(count: int, draws: int, seed: int) -> np.ndarray:
    """`(draws, count)`: rows of as many samples, drawn with replacement."""
    if count == 0:
        raise ValueError("There are no values, so they have no interval.")
    return np.random.default_rng(seed).integers(0, count, (draws, count))


def _middle(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95%."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
