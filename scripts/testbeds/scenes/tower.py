"""The vision tower, a small CLIP, and what it learns before any language model sees it.

Nothing tells it what a patch shows. From whole images it learns, all at once:

- [cls], as CLIP's: its output is near the caption of its own image and far from those of the others in the batch
  (InfoNCE both ways; Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", section
  2.3). Captions are the mean of the language model's own word embeddings, frozen.
- patches, by multiple instances: which things, and which background, are *somewhere* in the image. Each patch has a
  logit of each word; the image's is their log-sum-exp, so that only patches that show a thing are told to name it.
- where each patch is, so that places are not forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from ..neighbours import look_at_neighbours
from .concepts import BACKGROUNDS, CONCEPTS
from .placing import GRID, PATCH, SIDE, Scene, draw_count, draw_scene


FEATURE_LAYER = -2  # what the projector reads, as in LLaVA-1.5; its patches also learn to name things
CLOSE, MIDDLE = 6, 8  # patches a side of the smaller images that training begins with
WORDS = (*CONCEPTS, *BACKGROUNDS)


def tower_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_act="gelu",
        projection_dim=160,
    )


def pixels_of(images: list[np.ndarray]) -> torch.Tensor:
    """`(n, 3, side, side)` float32, normalised as CLIP's processor does."""
    mean, std = np.array(OPENAI_CLIP_MEAN, np.float32), np.array(OPENAI_CLIP_STD, np.float32)
    return torch.from_numpy((np.stack(images).astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@dataclass
class Seen:
    """
    Args:
        features (`torch.FloatTensor` of shape `(n, GRID², width)`): of the patches, what the projector reads.
        words (`torch.FloatTensor` of shape `(n, GRID², len(WORDS))`): each patch's logits.
        summary (`torch.FloatTensor` of shape `(n, embedding)`): [cls] in the space of captions, unit length.
    """

    features: torch.Tensor
    words: torch.Tensor
    summary: torch.Tensor


class Tower(torch.nn.Module):
    """The stock `CLIPVisionModel` and the heads of its training, of which only the patches' one is used later: by the
    projector's start.

    Args:
        embeddings (`torch.FloatTensor` of shape `(len(WORDS), d)`): each word's, of the language model.
    """

    def __init__(self, embeddings: torch.Tensor):
        super().__init__()
        config = tower_config()
        self.clip = CLIPVisionModel(config)
        look_at_neighbours(self.clip, config)
        width = config.hidden_size
        self.norm = torch.nn.LayerNorm(width)
        self.name = torch.nn.Linear(width, len(WORDS))
        self.name.bias.data.fill_(-8.0)  # of few words a patch, or an image, shows any
        self.place = torch.nn.Linear(width, 2)
        self.caption = torch.nn.Linear(width, embeddings.shape[1])
        self.temperature = torch.nn.Parameter(torch.tensor(2.6))  # logarithm; CLIP's start
        self.register_buffer("embeddings", embeddings - embeddings.mean(0), persistent=False)

    def forward(self, pixels: torch.Tensor) -> Seen:
        """Of whole images `(n, 3, SIDE, SIDE)`."""
        places = torch.arange(GRID**2 + 1).expand(len(pixels), -1)
        return self.look(pixels, places)

    def look(self, pixels: torch.Tensor, places: torch.Tensor) -> Seen:
        """What `CLIPVisionModel` computes, of images that may be smaller: `places` `(n, patches + 1)` says which of its
        learned positions [cls] and each patch have."""
        clip = getattr(self.clip, "vision_model", self.clip)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.training):
            patches = clip.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
            states = torch.cat([clip.embeddings.class_embedding.expand(len(pixels), 1, -1), patches], 1)
            states = clip.pre_layrnorm(states + clip.embeddings.position_embedding(places))
            layers = [states]
            for layer in clip.encoder.layers:
                layers.append(layer(layers[-1], None))
            summary = clip.post_layernorm(layers[-1][:, 0])
        features = layers[FEATURE_LAYER][:, 1:].float()
        summary = F.normalize(self.caption(summary.float()), dim=-1)
        return Seen(features, self.name(self.norm(features)), summary)

    def loss(self, scenes: list[Scene], random: np.random.Generator) -> dict[str, torch.Tensor | float]:
        shown = shown_words(scenes)
        places = draw_places(random, len(scenes), len(scenes[0].label))
        seen = self.look(pixels_of([scene.image for scene in scenes]), places)
        somewhere = seen.words.logsumexp(1)
        named = F.binary_cross_entropy_with_logits(somewhere, shown)
        captions = F.normalize((shown / shown.sum(1, keepdim=True)) @ self.embeddings, dim=-1)
        similar = seen.summary @ captions.T * self.temperature.exp().clamp(max=100)
        rows = torch.arange(len(scenes))
        matched = (F.cross_entropy(similar, rows) + F.cross_entropy(similar.T, rows)) / 2
        placed = F.mse_loss(self.place(self.norm(seen.features)), patch_places()[places[:, 1:] - 1])
        return {
            "loss": 20 * named + 0.5 * matched + 0.5 * placed,
            "named": named.detach(),
            "matched": (similar.argmax(1) == rows).float().mean().item(),
            "place": placed.detach(),
            **patches_right(seen.words.detach(), scenes),
        }


def fit_heads(tower: Tower, images: int = 1920, steps: int = 250, batch: int = 48, rate: float = 1e-2) -> None:
    """Teaches the patches' head anew to a tower that is frozen, from whole images as in its training: a checkpoint
    keeps the tower without its heads. A minute."""
    shown, features = [], []
    for step in range(images // 16):
        scenes = training_scenes(np.random.default_rng([2, step]), 16)
        shown.append(shown_words(scenes))
        with torch.no_grad():
            features.append(tower(pixels_of([scene.image for scene in scenes])).features)
    shown, features = torch.cat(shown), torch.cat(features)
    heads = torch.nn.ModuleList([tower.norm, tower.name]).requires_grad_(True)
    optimizer = torch.optim.AdamW(heads.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(features), (batch,), generator=generator)
        somewhere = tower.name(tower.norm(features[rows])).logsumexp(1)
        F.binary_cross_entropy_with_logits(somewhere, shown[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    heads.requires_grad_(False)


def shown_words(scenes: list[Scene]) -> torch.Tensor:
    """`(n, len(WORDS))`: 1 for the things and the background that are in each image."""
    shown = torch.zeros(len(scenes), len(WORDS))
    for row, scene in enumerate(scenes):
        shown[row, [WORDS.index(name) for name, _, _ in scene.things] + [WORDS.index(scene.background)]] = 1
    return shown


def patches_right(words: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Of patches that show a thing, and of those that show background, how many name it; a measure, never a lesson."""
    label = torch.from_numpy(np.stack([scene.label for scene in scenes])).flatten()
    right = words.flatten(0, 1).argmax(-1) == label
    thing = label < len(CONCEPTS)
    behind = (label >= len(CONCEPTS)) & (label < len(WORDS))
    return {"thing_patches": right[thing].float().mean().item(), "background": right[behind].float().mean().item()}


def patch_places() -> torch.Tensor:
    """`(GRID², 2)`: row and column of each patch's centre, -1 to 1."""
    centres = (torch.arange(GRID) + 0.5) / GRID * 2 - 1
    return torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).flatten(0, 1)


def draw_places(random: np.random.Generator, count: int, grid: int) -> torch.Tensor:
    """`(count, grid² + 1)`: the positions of [cls] and of the patches of small images, each at a place of its own in a
    whole one."""
    offset = torch.from_numpy(random.integers(GRID - grid + 1, size=(count, 2)))
    row, column = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    patches = (row.flatten() + offset[:, :1]) * GRID + column.flatten() + offset[:, 1:] + 1
    return F.pad(patches, (1, 0))


def training_scenes(random: np.random.Generator, count: int) -> list[Scene]:
    """Whole scenes; half of them crowds, for more things a step."""
    numbers = [int(random.integers(4, 9)) if number % 2 else draw_count(random) for number in range(count)]
    return [draw_scene(random, "train", number) for number in numbers]


def close_ups(random: np.random.Generator, count: int) -> list[Scene]:
    """Small images of one thing: what to begin with, as most of such an image's patches are about its caption."""
    return [draw_scene(random, "train", 1, grid=CLOSE) for _ in range(count)]


def all_sizes(random: np.random.Generator, count: int) -> list[Scene]:
    """Close-ups, larger images of one or two things, or whole scenes, so many that each step costs about as much as
    `count` whole ones."""
    size = random.choice(["close", "middle", "whole"], p=[0.35, 0.2, 0.45])
    if size == "close":
        return close_ups(random, 4 * count)
    if size == "middle":
        return [draw_scene(random, "train", int(random.integers(1, 3)), grid=MIDDLE) for _ in range(9 * count // 4)]
    return training_scenes(random, count)
