"""Every example through the vision tower once: its visual tokens, and what pruning rules may know of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel

from transformers_rbl import PruningConfig

from .testbed import Example
from .tokens import Visual, encode, family_of, patch_shares, subject_shares, token_centres, vision_side, visual_inputs


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
        measures (`dict[str, torch.FloatTensor]`): what else of the tokens a scorer may read, `(n, …)` by the name of
            its argument; of towers with a [cls] token `cls_similarity` and `cls_attention`.
    """

    example: Example
    images: list[Visual]
    group: torch.Tensor
    subject: torch.Tensor
    others: dict[str, torch.Tensor] = field(default_factory=dict)
    measures: dict[str, torch.Tensor] = field(default_factory=dict)

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

    def one_by_one(self) -> list[Encoded]:
        """The example once for each of its questions, for rules that read the question."""
        return [replace(self, example=replace(self.example, questions=[asked])) for asked in self.example.questions]

    @property
    def touched(self) -> float:
        """Share of the tokens, row ends aside, that show something that questions ask about."""
        return float((self.subject[self.group >= 0] > 0).float().mean())

    def chosen(self, choose: Callable[[torch.Tensor, int], torch.Tensor]) -> torch.Tensor:
        """`(n,)` bool: what `choose(rows, group)` keeps of each image's or frame's tokens, and all row ends."""
        mask = self.group < 0
        for group in range(int(self.group.max()) + 1):
            rows = torch.nonzero(self.group == group)[:, 0]
            mask[rows] = choose(rows, group)
        return mask


@torch.no_grad()
def encode_all(model: PreTrainedModel, examples: Sequence[Example]) -> list[Encoded]:
    """Visual tokens and measures of every example."""
    model.set_attn_implementation({"vision_config": "eager"})  # attention maps, for the comparison only
    encoded: dict[int, Encoded] = {}
    sizes: dict[tuple, list[int]] = {}
    for index, example in enumerate(examples):
        sizes.setdefault(example.images[0].shape, []).append(index)
    for indices in sizes.values():
        for start in range(0, len(indices), 16):
            part = indices[start : start + 16]
            encoded |= zip(part, encode_batch(model, [examples[i] for i in part]), strict=True)
    model.set_attn_implementation({"vision_config": "sdpa"})
    return [encoded[index] for index in range(len(examples))]


def encode_batch(model: PreTrainedModel, batch: Sequence[Example]) -> list[Encoded]:
    """Examples whose images are of one size."""
    config, measures = model.config, {}
    features = encode(model, batch, pruning=OFF)
    if family_of(config) in ("llava", "llava_next"):
        inputs = visual_inputs(config, batch)
        seen = model.model.vision_tower(
            inputs["pixel_values"].flatten(0, -4), output_attentions=True, output_hidden_states=True
        )
        hidden = seen.hidden_states[config.vision_feature_layer]
        measures["cls_similarity"] = F.cosine_similarity(hidden[:, 1:], hidden[:, :1], dim=-1)
        measures["cls_attention"] = seen.attentions[-1][:, :, 0, 1:].mean(1)
        measures = {name: values.unflatten(0, (len(batch), -1)) for name, values in measures.items()}
    encoded = []
    for row, example in enumerate(batch):
        centres = token_centres(config, example)
        assert len(centres) == sum(map(len, features[row]))
        group = groups(config, example, centres)
        laid = {name: lay_out(values[row], example, group) for name, values in measures.items()}
        shown = {name: patch_shares(config, example, patches) for name, patches in example.others().items()}
        encoded.append(Encoded(example, features[row], group, subject_shares(config, example), shown, laid))
    return encoded


def groups(config: PretrainedConfig, example: Example, centres: torch.Tensor) -> torch.Tensor:
    """`(n,)`: of which image or frame a token is, -1 for row ends."""
    ends = centres.isnan().any(1)
    if family_of(config) != "llava_onevision":
        return torch.where(ends, -1, 0)
    side = vision_side(config)
    length = ((side + 1) // 2) ** 2 if example.video else side**2 + 1
    return torch.where(ends, -1, torch.arange(len(centres)) // length)


def lay_out(values: torch.Tensor, example: Example, group: torch.Tensor) -> torch.Tensor:
    """Values per tile `(tiles, side²)` in the order of the tokens, 0 for row ends."""
    laid = torch.zeros(len(group))
    if len(values) == 1:
        laid[group >= 0] = values[0]
        return laid
    side = int(values.shape[1] ** 0.5)
    rows, columns = (length // side for length in example.labels[0].shape)
    grid = values[1:].view(rows, columns, side, side).transpose(1, 2).flatten()
    laid[group >= 0] = torch.cat([values[0], grid])
    return laid
