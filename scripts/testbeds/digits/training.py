"""What a model of digits learns, in three stages:

1. `tower`: the vision tower alone, on squares full of digits and decoys, names what each patch shows, its colour and
   its place; [cls] names the decoys, not the digits, as a caption of a scene leaves small print out. So the tower
   knows, and attends to, much that no question asks about.
2. `answer`: the tower frozen, projector and language model learn the questions, on whole images.
3. `window` (an option): the same, on images of which the language model is given a window of varying size that holds
   all digits, every other time with gaps where no digit is: so that it has seen visual sequences of many lengths and
   densities. A large model knows those from any-resolution training; without this, a small one is lost by any gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import tiny_checkpoint

from ..answering import answer
from ..neighbours import look_at_neighbours
from ..testbed import Stage
from ..tokens import encode, grid_centres, normalise, subject_shares, token_centres, window_mask
from ..trainer import TOWER, Trainer
from .model import stock_config, word_tokenizer
from .placing import BACKDROP, LABELS
from .questions import crowd, draw_example
from .sizes import GRID_SHARES, GRIDS, KINDS, PATCH, TILE


STAGES = {
    "llava": (Stage("tower", 900, 1e-3, 32), Stage("answer", 900, 1e-3, 32), Stage("window", 400, 6e-4, 32)),
    "llava_next": (Stage("tower", 750, 1e-3, 48), Stage("answer", 1200, 1e-3, 24), Stage("window", 500, 6e-4, 24)),
    "llava_onevision": (Stage("tower", 1000, 1e-3, 48), Stage("answer", 900, 1e-3, 24), Stage("window", 900, 6e-4, 24)),
}
FIRST_KIND = 0.6  # share of batches of a family's first kind: several images take longer to learn than video


class DigitsTrainer(Trainer):
    def __init__(self, family: str, seed: int, folder: Path, stages: Sequence[Stage]):
        self.family = family
        torch.manual_seed(seed)
        model = tiny_checkpoint.FAMILIES[family](stock_config(family))
        vision = model.config.vision_config
        look_at_neighbours(model.model.vision_tower, vision)
        self.patch_head = torch.nn.Linear(vision.hidden_size, len(LABELS))
        self.colour_head = torch.nn.Linear(vision.hidden_size, 3)
        self.place_head = torch.nn.Linear(vision.hidden_size, 2)
        self.scene_head = torch.nn.Linear(vision.hidden_size, len(LABELS) - BACKDROP - 1)
        heads = [self.patch_head, self.colour_head, self.place_head, self.scene_head]
        super().__init__(model, word_tokenizer(), heads, seed, folder, stages)

    def loss(self, random: np.random.Generator, stage: Stage, step: int) -> dict[str, torch.Tensor | float]:
        if stage.name == TOWER:
            return self.tower_loss(random, stage)
        return self.answer_loss(random, stage, early=step < 0.3 * stage.steps)

    def tower_loss(self, random: np.random.Generator, stage: Stage) -> dict[str, torch.Tensor | float]:
        side = TILE[self.family]
        scenes = [crowd(random, "train", side) for _ in range(stage.batch)]
        pixels = normalise(np.stack([scene.images[0] for scene in scenes]))
        labels = torch.from_numpy(np.stack([scene.labels[0].flatten() for scene in scenes]))
        outputs = self.model.model.vision_tower(pixels, output_hidden_states=True)
        tokens = outputs.hidden_states[self.model.config.vision_feature_layer]
        clip = outputs.get("pooler_output") is not None
        patches = tokens[:, 1:] if clip else tokens
        logits, colours = self.patch_head(patches).float(), self.colour_head(patches).float()
        weight = torch.ones(len(LABELS))
        weight[BACKDROP] = 0.1
        # Decoys matter to the tower, as every object does to CLIP, but half as much: it is small.
        weight[BACKDROP + 1 :] = 0.5
        named = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)
        coloured = F.mse_loss(colours, F.avg_pool2d(pixels, PATCH).flatten(2).transpose(1, 2))
        places = grid_centres(2, 2, side // PATCH, side // PATCH) - 1
        placed = F.mse_loss(self.place_head(patches).float(), places.expand(len(scenes), -1, -1))
        shown = torch.zeros(len(scenes), len(LABELS)).scatter_(1, labels, 1.0)[:, BACKDROP + 1 :]
        summary = self.scene_head(outputs.pooler_output if clip else tokens.mean(1)).float()
        seen = F.binary_cross_entropy_with_logits(summary, shown)
        right, digit = logits.argmax(-1) == labels, labels < BACKDROP
        return {
            "loss": named + 0.5 * coloured + placed + seen,
            "digit_patches": right[digit].float().mean().item(),
            "colour_error": coloured.item(),
            "place_error": placed.item(),
            "decoy_patches": right[labels > BACKDROP].float().mean().item(),
        }

    def answer_loss(self, random: np.random.Generator, stage: Stage, early: bool) -> dict[str, torch.Tensor | float]:
        kinds = KINDS[self.family]
        kind = kinds[0] if len(kinds) == 1 or random.random() < FIRST_KIND else kinds[1]
        grid = (1, 1)
        if self.family == "llava_next":  # single tiles first: they cost less, and teach the digits
            small = stage.name == "answer" and early and random.random() < 0.7
            grid = (1, 1) if small else GRIDS[int(random.choice(len(GRIDS), p=GRID_SHARES))]
        size = (grid[0] * TILE[self.family], grid[1] * TILE[self.family])
        batch = [draw_example(random, kind, "train", size, stage.name == "window") for _ in range(stage.batch)]
        for drawn in batch:
            drawn.questions += drawn.lessons
        features = encode(self.model, batch)
        if stage.name == "window":
            lengths = [len(tokens) for tokens in features[0]]
            model_config = self.model.config
            centres = token_centres(model_config, batch[0])
            masks = [window_mask(random, centres, subject_shares(model_config, drawn), drawn) for drawn in batch]
            features = [
                [tokens[seen] for tokens, seen in zip(images, mask.split(lengths))]
                for images, mask in zip(features, masks)
            ]
        loss, right, _ = answer(self.model, self.tokenizer, features, batch)
        return {"loss": loss, **{f"{kind} {name}": share.float().mean().item() for name, share in right.items()}}
