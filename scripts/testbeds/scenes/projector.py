"""LLaVA's projector, and where it starts: in closed form, from what the tower itself says that patches show.

The start is a ridge regression from the features that the projector reads to the language model's own word
embeddings. The word of a patch is the tower's: the likeliest of its own head (see [`tower`]); no label is used. A patch
on which the head names no thing says its background. With the line-break start such a patch's target is a line break
with a part of its word; without, it is the whole word. Every target also says where the patch lies, along the words
for left and right and for top and bottom."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from .concepts import CONCEPTS
from .language import word_embeddings
from .tower import WORDS, Tower, patch_places, pixels_of, training_scenes


THING = -3.0  # from which logit a patch names a thing: many patches share what makes their sum likely
PLACE = 1.0  # of a word's length: how far a place moves its embedding
LINE_BREAK, WORD_PART = 0.9, 0.35  # what background is at the start: so much of a line break, so much of its word


class Projector(torch.nn.Module):
    """As `LlavaMultiModalProjector` computes, by its names."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.linear_1, self.linear_2 = torch.nn.Linear(width, size), torch.nn.Linear(size, size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(features)))


class Targets:
    """What a patch's visual token should be at the start.

    Args:
        line_break (`bool`): whether background starts as a line break with a part of its word.
    """

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, line_break: bool):
        words = word_embeddings(model, tokenizer, WORDS)
        length = words.norm(dim=-1).mean()
        left, right, top, bottom = word_embeddings(model, tokenizer, ("left", "right", "top", "bottom"))
        self.across, self.down = (F.normalize(way, dim=0) * length for way in (right - left, bottom - top))
        if line_break:
            table = model.get_input_embeddings().weight.detach().float()
            end = table[tokenizer("\n", add_special_tokens=False).input_ids].mean(0)
            behind = LINE_BREAK * F.normalize(end, dim=0) * length + WORD_PART * words[len(CONCEPTS) :]
            words = torch.cat([words[: len(CONCEPTS)], behind])
        self.words = words

    def __call__(self, named: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Of words `(n,)` at places `(n, 2)`: `(n, d)`."""
        return self.words[named] + PLACE * (places[:, :1] * self.down + places[:, 1:] * self.across)


def said_words(words: torch.Tensor) -> torch.Tensor:
    """`(n, GRID²)`: the word that each patch says, of its logits `(n, GRID², len(WORDS))`: the likeliest thing, if its
    logit is above `THING`, else the likeliest background."""
    things, behind = words[..., : len(CONCEPTS)], words[..., len(CONCEPTS) :]
    best, thing = things.max(-1)
    return torch.where(best > THING, thing, len(CONCEPTS) + behind.argmax(-1))


@torch.no_grad()
def closed_form(tower: Tower, targets: Targets, scenes: int = 480, seed: int = 20, ridge: float = 1e-4) -> Projector:
    """The projector whose second layer solves a ridge regression; its first holds the tower's own head, as far as it
    goes, and random directions."""
    generator = torch.Generator().manual_seed(0)
    tower.eval()
    features, named = [], []
    for step in range(scenes // 16):
        seen = tower(pixels_of([scene.image for scene in training_scenes(np.random.default_rng([seed, step]), 16)]))
        features.append(seen.features.flatten(0, 1))
        named.append(said_words(seen.words).flatten())
    x, said = torch.cat(features), torch.cat(named)
    wanted = targets(said, patch_places().repeat(scenes // 16 * 16, 1))
    weight = torch.where(said < len(CONCEPTS), 3.0, 1.0)[:, None]  # things are fewer
    width, size, count = x.shape[1], wanted.shape[1], len(WORDS)
    projector = Projector(width, size)
    mean, spread = x.mean(0), x.std(0) + 1e-3
    first = torch.randn(size, width, generator=generator) / width**0.5 / spread
    bias = -first @ mean + 0.3 * torch.randn(size, generator=generator)
    rows = tower.name.weight * tower.norm.weight / (x - x.mean(1, keepdim=True)).std(1).mean()
    logits = x @ rows.T
    first[:count], bias[:count] = rows / logits.std(), -(logits.mean(0) + logits.std(0)) / logits.std()
    projector.linear_1.weight.copy_(first)
    projector.linear_1.bias.copy_(bias)
    hidden = F.pad(F.gelu(projector.linear_1(x)), (0, 1), value=1.0)
    gram = (hidden * weight).T @ hidden
    gram += torch.eye(size + 1) * gram.diagonal().mean() * ridge
    solved = torch.linalg.solve(gram, (hidden * weight).T @ wanted)
    projector.linear_2.weight.copy_(solved[:-1].T)
    projector.linear_2.bias.copy_(solved[-1])
    return projector
