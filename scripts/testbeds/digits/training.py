"""What a model of digits learns, in three stages:

1. `tower`: the vision tower alone, on images full of digits and decoys, names what each patch shows, its colour and
   its place; [cls] (where there is none, the mean of all patches) names the decoys, not the digits, as a caption of a
   scene leaves small print out. So the tower knows, and attends to, much that no question asks about.
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

from ..answering import answer
from ..neighbours import look_at_neighbours, turn_to_neighbours
from ..testbed import Stage
from ..tokens import (
    encode,
    grid_centres,
    in_blocks,
    normalise,
    subject_shares,
    token_centres,
    visual_inputs,
    window_mask,
)
from ..trainer import TOWER, Trainer
from .model import stock_model, stock_processor
from .placing import BACKDROP, LABELS
from .questions import DigitExample, aligned_crowd, crowd, draw_example
from .sizes import KINDS, PATCH, SMALL_GRIDS, TILE, draw_size, draw_small_size, step_of


STAGES = {
    "llava": (Stage("tower", 900, 1e-3, 32), Stage("answer", 900, 1e-3, 32), Stage("window", 400, 6e-4, 32)),
    "llava_next": (Stage("tower", 750, 1e-3, 48), Stage("answer", 1200, 1e-3, 24), Stage("window", 500, 6e-4, 24)),
    "llava_onevision": (Stage("tower", 1000, 1e-3, 48), Stage("answer", 900, 1e-3, 24), Stage("window", 900, 6e-4, 24)),
    "qwen3_vl": (Stage("tower", 500, 1e-3, 32), Stage("answer", 800, 1e-3, 24), Stage("window", 350, 6e-4, 24)),
}
FIRST_KIND = 0.6  # share of batches of a family's first kind: several images take longer to learn than video


class DigitsTrainer(Trainer):
    def __init__(self, family: str, seed: int, folder: Path, stages: Sequence[Stage]):
        self.family = family
        torch.manual_seed(seed)
        model = stock_model(family)
        vision = model.config.vision_config
        if family == "qwen3_vl":  # its mergers are what a projector is to the others
            visual = model.model.visual
            tower = [visual.patch_embed, visual.pos_embed, visual.blocks]
            turn_to_neighbours(visual)
        else:
            tower = [model.model.vision_tower]
            look_at_neighbours(model.model.vision_tower, vision)
        self.patch_head = torch.nn.Linear(vision.hidden_size, len(LABELS))
        self.colour_head = torch.nn.Linear(vision.hidden_size, 3)
        self.place_head = torch.nn.Linear(vision.hidden_size, 2)
        self.scene_head = torch.nn.Linear(vision.hidden_size, len(LABELS) - BACKDROP - 1)
        heads = [self.patch_head, self.colour_head, self.place_head, self.scene_head]
        processor = stock_processor(model.config)
        self.tokenizer = processor.tokenizer
        super().__init__(model, processor, tower, heads, seed, folder, stages)

    def loss(self, random: np.random.Generator, stage: Stage, step: int) -> dict[str, torch.Tensor | float]:
        if stage.name == TOWER:
            return self.tower_loss(random, stage)
        return self.answer_loss(random, stage, early=step < 0.3 * stage.steps)

    def tower_loss(self, random: np.random.Generator, stage: Stage) -> dict[str, torch.Tensor | float]:
        if self.family == "qwen3_vl":
            size = (draw_size if random.random() < 0.3 else draw_small_size)(random, self.family)
            scenes = [aligned_crowd(random, "train", size) for _ in range(stage.batch)]
        else:
            size = (TILE[self.family], TILE[self.family])
            scenes = [crowd(random, "train", size) for _ in range(stage.batch)]
        pixels = normalise(np.stack([scene.images[0] for scene in scenes]))
        labels = torch.from_numpy(np.stack([scene.labels[0].flatten() for scene in scenes]))
        patches, summary = self.look(scenes, pixels)
        logits, colours = self.patch_head(patches).float(), self.colour_head(patches).float()
        weight = torch.ones(len(LABELS))
        weight[BACKDROP] = 0.1
        # Decoys matter to the tower, as every object does to CLIP, but half as much: it is small.
        weight[BACKDROP + 1 :] = 0.5
        named = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)
        coloured = F.mse_loss(colours, F.avg_pool2d(pixels, PATCH).flatten(2).transpose(1, 2))
        places = grid_centres(2, 2, size[0] // PATCH, size[1] // PATCH) - 1
        placed = F.mse_loss(self.place_head(patches).float(), places.expand(len(scenes), -1, -1))
        shown = torch.zeros(len(scenes), len(LABELS)).scatter_(1, labels, 1.0)[:, BACKDROP + 1 :]
        seen = F.binary_cross_entropy_with_logits(self.scene_head(summary).float(), shown)
        right, digit = logits.argmax(-1) == labels, labels < BACKDROP
        return {
            "loss": named + 0.5 * coloured + placed + seen,
            "digit_patches": right[digit].float().mean().item(),
            "colour_error": coloured.item(),
            "place_error": placed.item(),
            "decoy_patches": right[labels > BACKDROP].float().mean().item(),
        }

    def look(self, scenes: Sequence[DigitExample], pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tower says of each patch `(n, patches, width)`, row by row, and of each image as a whole."""
        if self.family == "qwen3_vl":
            inputs, merge = visual_inputs(self.model.config, scenes), self.model.config.vision_config.spatial_merge_size
            states = self.model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).last_hidden_state
            rows, columns = scenes[0].labels[0].shape
            order = in_blocks(torch.arange(rows * columns).view(1, rows, columns), merge)[0]
            patches = states.unflatten(0, (len(scenes), -1))[:, order.argsort()]
            return patches, patches.mean(1)
        outputs = self.model.model.vision_tower(pixels, output_hidden_states=True)
        tokens = outputs.hidden_states[self.model.config.vision_feature_layer]
        if outputs.get("pooler_output") is None:
            return tokens, tokens.mean(1)
        return tokens[:, 1:], outputs.pooler_output

    def answer_loss(self, random: np.random.Generator, stage: Stage, early: bool) -> dict[str, torch.Tensor | float]:
        kinds = KINDS[self.family]
        kind = kinds[0] if len(kinds) == 1 or random.random() < FIRST_KIND else kinds[1]
        small = self.family in SMALL_GRIDS and stage.name == "answer" and early and random.random() < 0.7
        size = (draw_small_size if small else draw_size)(random, self.family)
        window, step = stage.name == "window", step_of(self.family)
        batch = [draw_example(random, kind, "train", size, window, step) for _ in range(stage.batch)]
        for drawn in batch:
            drawn.questions += drawn.lessons
        features = encode(self.model, batch)
        if window:
            lengths = [len(image) for image in features[0]]
            model_config = self.model.config
            centres = token_centres(model_config, batch[0])
            masks = [window_mask(random, centres, subject_shares(model_config, drawn), drawn) for drawn in batch]
            features = [
                [image.kept(seen) for image, seen in zip(images, mask.split(lengths))]
                for images, mask in zip(features, masks)
            ]
        loss, right, _ = answer(self.model, self.tokenizer, features, batch)
        return {"loss": loss, **{f"{kind} {name}": share.float().mean().item() for name, share in right.items()}}
