"""Every example through the vision tower once: its visual tokens, and what pruning rules may know of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from transformers_rbl import PruningConfig
from transformers_rbl.models.merging import Choice
from transformers_rbl.models.scorers import SCORERS, TOWER_NEEDS, scorer_arguments

from .testbed import Example
from .tokens import (
    Visual,
    family_of,
    features_of,
    patch_shares,
    subject_shares,
    token_centres,
    vision_side,
    visuals_of,
)


OFF = PruningConfig(enabled=False)


@dataclass(frozen=True)
class Kept:
    """What a rule leaves of an example: `mask` `(n,)` bool over its tokens, and its images with those that stay."""

    mask: torch.Tensor
    images: list[Visual]


@dataclass
class Encoded:
    """An example's visual tokens in the order of its prompt, and what rules may know of them.

    Args:
        images (`list[Visual]`): unpruned, `n` tokens in all; a video counts as one.
        group (`torch.LongTensor` of shape `(n,)`): image or frame of each token, -1 for row ends.
        subject (`torch.FloatTensor` of shape `(n,)`): share of the token's patches that show what questions ask about.
        others (`dict[str, torch.FloatTensor]`): the same for whatever else they show, by name.
        measures (`dict[str, torch.FloatTensor]`): what scorers read of the vision tower, `(n, …)` by the name of their
            argument, as far as the tower has it.
        question (`torch.FloatTensor` of shape `(m, d)`, *optional*): word embeddings of the prompt of an example with
            one question, see [`~Encoded.one_by_one`].
    """

    example: Example
    images: list[Visual]
    group: torch.Tensor
    subject: torch.Tensor
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    measures: dict[str, torch.Tensor] = field(default_factory=dict)
    question: torch.Tensor | None = None

    @functools.cached_property
    def tokens(self) -> torch.Tensor:
        """`(n, d)`."""
        return torch.cat([image.tokens for image in self.images])

    def left(self, mask: torch.Tensor) -> Kept:
        """What is left of the images where `mask` `(n,)` is True."""
        parts = mask.split([len(image) for image in self.images])
        return Kept(mask, [image.kept(part) for image, part in zip(self.images, parts)])

    def share(self, mask: torch.Tensor) -> float:
        """Share of the tokens, row ends aside, that `mask` `(n,)` keeps."""
        return float(mask[self.group >= 0].float().mean())

    @property
    def touched(self) -> float:
        """Share of the tokens, row ends aside, that show something that questions ask about."""
        return float((self.subject[self.group >= 0] > 0).float().mean())

    def one_by_one(self, embedded: Callable[[str], torch.Tensor]) -> list[Encoded]:
        """The example once for each of its questions, for rules that read the question; `embedded(question)` gives the
        word embeddings `(m, d)` of its prompt."""
        return [
            replace(self, example=replace(self.example, questions=[asked]), question=embedded(asked[1]))
            for asked in self.example.questions
        ]

    def scored(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        """Of each image or frame, its rows among the tokens, and what scorers are given."""
        for group in range(int(self.group.max()) + 1):
            rows = torch.nonzero(self.group == group)[:, 0]
            inputs = {name: values[rows] for name, values in self.measures.items()}
            inputs |= {} if self.question is None else {"question": self.question}
            yield rows, {"tokens": self.tokens[rows], "frame": group, **inputs}

    def chosen(self, choices: Sequence[Choice]) -> Kept:
        """What choices leave, one for each image or frame in the order of [`~Encoded.scored`]; all row ends stay."""
        mask, views = self.group < 0, [self.tokens, *map(torch.cat, zip(*(image.views for image in self.images)))]
        for (rows, _), choice in zip(self.scored(), choices, strict=True):
            mask[rows] = choice.kept
            if choice.weights is not None:
                views = [view.index_copy(0, rows, choice.merged(view[rows])) for view in views]
        lengths = [len(image) for image in self.images]
        tokens, *others = (view.split(lengths) for view in views)
        images = [
            replace(image, tokens=tokens[n], views=tuple(view[n] for view in others)).kept(part)
            for n, (image, part) in enumerate(zip(self.images, mask.split(lengths)))
        ]
        return Kept(mask, images)


@torch.no_grad()
def encode_all(model: PreTrainedModel, examples: Sequence[Example]) -> list[Encoded]:
    """Visual tokens and measures of every example."""
    encoded: dict[int, Encoded] = {}
    sizes: dict[tuple, list[int]] = {}
    for index, example in enumerate(examples):
        sizes.setdefault(example.images[0].shape, []).append(index)
    for indices in sizes.values():
        for start in range(0, len(indices), 16):
            part = indices[start : start + 16]
            encoded |= zip(part, encode_batch(model, [examples[i] for i in part]), strict=True)
    return [encoded[index] for index in range(len(examples))]


def encode_batch(model: PreTrainedModel, batch: Sequence[Example]) -> list[Encoded]:
    """Examples whose images are of one size."""
    config = model.config
    inputs, outputs = features_of(model, batch, pruning=OFF, output_hidden_states=True)
    features = visuals_of(model, batch, inputs, outputs)
    measures = measures_of(model, inputs, outputs, [len(image) for images in features for image in images])
    encoded = []
    for images, example in zip(features, batch, strict=True):
        centres = token_centres(config, example)
        assert len(centres) == sum(map(len, images))
        own, measures = measures[: len(images)], measures[len(images) :]
        joined = {name: torch.cat([image[name] for image in own]) for name in own[0]}
        subject = subject_shares(config, example)
        others = {name: patch_shares(config, example, patches) for name, patches in example.others().items()}
        encoded.append(Encoded(example, images, groups(config, example, centres), subject, others, joined))
    return encoded


def measures_of(model: PreTrainedModel, inputs: dict, outputs: Any, lengths: list[int]) -> list[dict]:
    """Per image or video what scorers read of the vision tower, `(L, …)` by the name of their argument, as far as the
    model has it: what the library gives its own scorers."""
    measures: list[dict[str, torch.Tensor]] = [{} for _ in lengths]
    modality = "video" if "pixel_values_videos" in inputs else "image"
    for name in TOWER_NEEDS:
        reader = next((score for score in SCORERS if name in scorer_arguments(score)), None)
        if reader is None:
            continue
        rule = PruningConfig(keep_ratio=0.5, score=reader)
        try:
            found = model.model.scorer_inputs(modality, outputs, rule, inputs, lengths)
        except ValueError:  # this tower has nothing of the kind; a rule that needs it is refused by the model
            continue
        for image, own in zip(measures, found, strict=True):
            image[name] = own[name]
    return measures


def groups(config: PretrainedConfig, example: Example, centres: torch.Tensor) -> torch.Tensor:
    """`(n,)`: of which image or frame a token is, -1 for row ends."""
    ends = centres.isnan().any(1)
    if family_of(config) != "llava_onevision":
        return torch.where(ends, -1, 0)
    side = vision_side(config)
    length = ((side + 1) // 2) ** 2 if example.video else side**2 + 1
    return torch.where(ends, -1, torch.arange(len(centres)) // length)
