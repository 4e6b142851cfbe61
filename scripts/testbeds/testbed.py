"""What every testbed has: examples (images, what they show, questions), and what the shared commands ask of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image


SPLITS = ("train", "validation", "test")


@dataclass(kw_only=True)
class Example:
    """Images or one video, what is where in them, and questions.

    Args:
        images (`list[np.ndarray]`): `(height, width, 3)` uint8; a video's frames if `video`.
        labels (`list[np.ndarray]`): per image, `(rows, columns)`: what each patch shows, as its testbed numbers it.
        questions (`list[tuple[str, str, str]]`): kind, question, answer; what is evaluated.
        lessons (`list[tuple[str, str, str]]`): more of them, for training only.
        video (`bool`): whether the images are frames.
        window (`tuple[int, int, int, int]`, *optional*): top, left, rows and columns, in patches, that hold all that
            the questions ask about.
    """

    images: list[np.ndarray]
    labels: list[np.ndarray]
    questions: list[tuple[str, str, str]] = field(default_factory=list)
    lessons: list[tuple[str, str, str]] = field(default_factory=list)
    video: bool = False
    window: tuple[int, int, int, int] | None = None

    def subjects(self) -> list[np.ndarray]:
        """Per image, `(rows, columns)` bool: the patches that show what questions ask about."""
        raise NotImplementedError

    def others(self) -> dict[str, list[np.ndarray]]:
        """Whatever else patches show, by name, each as [`~Example.subjects`]: what a rule kept instead."""
        return {"other": [subject == 0 for subject in self.subjects()]}

    def pictures(self) -> list[Image.Image]:
        return [Image.fromarray(image) for image in self.images]

    def captions(self) -> list[str]:
        """What the prompt says before each image (before a video as a whole)."""
        return [""] if self.video or len(self.images) == 1 else [f"image {n + 1}:" for n in range(len(self.images))]

    def prompt(self, question: str) -> str:
        """The question after its images, or its video."""
        placeholder = "<video>" if self.video else "<image>"
        return " ".join([*(f"{caption} {placeholder}".strip() for caption in self.captions()), question])


@dataclass(frozen=True)
class Stage:
    """A part of a training: its name, optimiser steps, highest learning rate and examples a step."""

    name: str
    steps: int
    lr: float
    batch: int


class DrawsExamples(Protocol):
    def __call__(
        self, family: str, kind: str, split: str, count: int, seed: int, grid: tuple[int, int] | None = None
    ) -> Iterator[Example]:
        """`count` examples of a split, each from a generator of its own; `grid` fixes the tiles of an image."""


@dataclass(frozen=True)
class Testbed:
    """One testbed, as the commands see it.

    Args:
        name (`str`): that of its package beside this file.
        kinds (`dict[str, tuple[str, ...]]`): what the model of each family is shown: `"image"`, `"images"`, `"video"`.
        examples (`DrawsExamples`): draws its data.
        stages (`dict[str, tuple[Stage, ...]]`): how each family's model is trained.
        trainer (`Callable`): `trainer(family, seed, folder, stages)` is a [`training.Trainer`].
        subject (`str`): what its questions ask about, in names of rules and tables.
        card (`str`): for a checkpoint's card, how it came to be and what it answers; examples follow.
        results (`str`): the page of its results.
        caveats (`tuple[str, ...]`): what figures of it do not say, in Markdown; links are relative to docs/results.
    """

    name: str
    kinds: dict[str, tuple[str, ...]]
    examples: DrawsExamples
    stages: dict[str, tuple[Stage, ...]]
    trainer: Callable
    subject: str
    card: str
    results: str
    caveats: tuple[str, ...] = ()
