"""Train a testbed model from scratch, on a CPU, in three stages:

1. `tower`: the vision tower alone, on squares full of digits and decoys, names what each patch shows, its colour and
   its place; [cls] names the decoys, not the digits, as a caption of a scene leaves small print out. So the tower
   knows, and attends to, much that no question asks about.
2. `answer`: the tower frozen, projector and language model learn the questions, on whole images.
3. `window` (an option): the same, on images of which the language model is given a window of varying size that holds
   all digits, every other time with gaps where no digit is: so that it has seen visual sequences of many lengths and
   densities. A large model knows those from any-resolution training; without this, a small one is lost by any gap.

python scripts/testbeds train outputs/testbed-next --family llava_next --seed 0

Deterministic by seed (one thread, one machine); killed, it goes on from its last saved step.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import tiny_checkpoint

from . import data
from .data import BACKDROP, LABELS, PATCH, TILE, Example


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    lr: float
    batch: int


STAGES = {
    "llava": (Stage("tower", 900, 1e-3, 32), Stage("answer", 900, 1e-3, 32), Stage("window", 400, 6e-4, 32)),
    "llava_next": (Stage("tower", 750, 1e-3, 48), Stage("answer", 1200, 1e-3, 24), Stage("window", 500, 6e-4, 24)),
    "llava_onevision": (
        Stage("tower", 1000, 1e-3, 48),
        Stage("answer", 900, 1e-3, 24),
        Stage("window", 900, 6e-4, 24),
    ),
}
FIRST_KIND = 0.6  # share of batches of a family's first kind: several images take longer to learn than video
SAVE_EVERY = 100  # steps


class Trainer:
    """One model, its stages, and what is needed to go on after a kill."""

    def __init__(self, family: str, seed: int, folder: Path, stages: tuple[Stage, ...]):
        self.family, self.seed, self.folder, self.stages = family, seed, folder, stages
        torch.manual_seed(seed)
        self.model = tiny_checkpoint.FAMILIES[family](data.config(family))
        vision = self.model.config.vision_config
        look_at_neighbours(self.model.model.vision_tower, vision)
        # Auxiliary heads of the first stage, thrown away.
        self.patch_head = torch.nn.Linear(vision.hidden_size, len(LABELS))
        self.colour_head = torch.nn.Linear(vision.hidden_size, 3)
        self.place_head = torch.nn.Linear(vision.hidden_size, 2)
        self.scene_head = torch.nn.Linear(vision.hidden_size, len(LABELS) - BACKDROP - 1)
        self.tokenizer = data.tokenizer()
        self.spent = 0.0  # CPU seconds, over restarts

    def parts(self) -> torch.nn.ModuleList:
        heads = [self.patch_head, self.colour_head, self.place_head, self.scene_head]
        return torch.nn.ModuleList([self.model, *heads])

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "state.pt"
        state = torch.load(path, weights_only=True) if path.exists() else None
        first = 0 if state is None else state["stage"]
        if state is not None:
            self.parts().load_state_dict(state["weights"])
            self.spent = state["spent"]
        for number in range(first, len(self.stages)):
            self._stage(number, state if state is not None and number == first else None)
        path.unlink(missing_ok=True)

    def _stage(self, number: int, state: dict | None) -> None:
        stage, began = self.stages[number], time.process_time() - self.spent
        tower = stage.name == "tower"
        self.parts().requires_grad_(tower)
        self.model.requires_grad_(True)
        self.model.model.vision_tower.requires_grad_(tower)
        weights = [p for p in self.parts().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [{"params": [p for p in weights if p.dim() > 1], "weight_decay": 0.05},
             {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0}],
            lr=stage.lr, betas=(0.9, 0.98),
        )  # fmt: skip
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, stage.steps))
        start = 0
        if state is not None and state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            start = state["step"]
        log = (self.folder / "log.jsonl").open("a")
        for step in tqdm(range(start, stage.steps), initial=start, total=stage.steps, desc=stage.name):
            random = np.random.default_rng([self.seed, number, step])  # data by step: a restart draws the same
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = (
                    self._tower_loss(random, stage)
                    if tower
                    else self._answer_loss(random, stage, step < 0.3 * stage.steps)
                )
                loss = losses.pop("loss")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            self.spent = time.process_time() - began
            if step % 50 == 49 or step == stage.steps - 1:
                row = {"stage": stage.name, "step": step + 1, "loss": loss.item(), **losses, "cpu_s": self.spent}
                log.write(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
                log.flush()
            if step % SAVE_EVERY == SAVE_EVERY - 1:
                self._save_state(number, step + 1, optimizer.state_dict(), scheduler.state_dict())
        log.close()
        if not tower:
            self.save(self.folder / stage.name)
        self._save_state(number + 1, 0, None, None)

    def _save_state(self, stage, step, optimizer, scheduler) -> None:
        state = {"stage": stage, "step": step, "weights": self.parts().state_dict(), "optimizer": optimizer}
        half = self.folder / "state.half"
        torch.save({**state, "scheduler": scheduler, "spent": self.spent}, half)
        half.replace(self.folder / "state.pt")

    def save(self, folder: Path) -> None:
        """The checkpoint in bfloat16, in Hub-repository form."""
        model = self.model
        model.generation_config = GenerationConfig(
            pad_token_id=tiny_checkpoint.PAD, bos_token_id=tiny_checkpoint.BOS, eos_token_id=tiny_checkpoint.EOS
        )
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        model.load_state_dict(weights)  # the next stage goes on from what is saved, rounded
        model.config.dtype = torch.bfloat16
        model.save_pretrained(folder, state_dict=weights)
        tiny_checkpoint.processor(model.config, self.tokenizer).save_pretrained(folder)

    # -- stage 1

    def _tower_loss(self, random, stage: Stage) -> dict:
        side = TILE[self.family]
        scenes = [data.crowd(random, "train", side) for _ in range(stage.batch)]
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
        right, digit = logits.argmax(-1) == labels, labels < 10
        return {
            "loss": named + 0.5 * coloured + placed + seen,
            "digit_patches": right[digit].float().mean().item(),
            "colour_error": coloured.item(),
            "place_error": placed.item(),
            "decoy_patches": right[labels > BACKDROP].float().mean().item(),
        }

    # -- stages 2 and 3

    def _answer_loss(self, random, stage: Stage, early: bool) -> dict:
        kinds = data.KINDS[self.family]
        kind = kinds[0] if len(kinds) == 1 or random.random() < FIRST_KIND else kinds[1]
        grid = (1, 1)
        if self.family == "llava_next":  # single tiles first: they cost less, and teach the digits
            small = stage.name == "answer" and early and random.random() < 0.7
            grid = (1, 1) if small else data.GRIDS[int(random.choice(len(data.GRIDS), p=data.GRID_SHARES))]
        size = (grid[0] * TILE[self.family], grid[1] * TILE[self.family])
        batch = [data.example(random, kind, "train", size, stage.name == "window") for _ in range(stage.batch)]
        for example in batch:
            example.questions += example.lessons
        features = encode(self.model, self.family, batch)
        if stage.name == "window":
            lengths = [len(tokens) for tokens in features[0]]
            centres = token_centres(self.family, batch[0])
            seen = [
                window_mask(random, centres, digit_shares(self.family, each), each).split(lengths) for each in batch
            ]
            features = [[tokens[mask] for tokens, mask in zip(images, masks)] for images, masks in zip(features, seen)]
        loss, right, _ = answer(self.model, self.tokenizer, features, batch)
        return {"loss": loss, **{f"{kind} {name}": share.float().mean().item() for name, share in right.items()}}


def vision_side(config) -> int:
    """Patches along one side of a tile."""
    return config.image_size // config.patch_size


def normalise(images: np.ndarray) -> torch.Tensor:
    """Pixel values of images `(n, height, width, 3)` uint8, as the image processors make them."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def visual_inputs(family: str, batch: list[Example]) -> dict:
    """What the family's processor returns for the images of a batch of one size, without its loops."""
    images = np.stack([image for example in batch for image in example.images])
    height, width = images.shape[1:3]
    if batch[0].video:
        return {"pixel_values_videos": normalise(images).unflatten(0, (len(batch), -1))}
    if family == "llava":
        return {"pixel_values": normalise(images)}
    sizes = torch.tensor([[height, width]] * len(images))
    if family == "llava_onevision":
        return {
            "pixel_values": normalise(images)[:, None], "image_sizes": sizes, "batch_num_images": [3] * len(batch)
        }  # fmt: skip
    side = TILE[family]
    base = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    for shape in ((height, side), (side, side)):  # one axis after the other, in whole levels: as PIL does
        base = F.interpolate(base, shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    tiles = torch.from_numpy(images).unflatten(1, (-1, side)).unflatten(3, (-1, side))
    tiles = tiles.permute(0, 1, 3, 2, 4, 5).flatten(1, 2)
    pixels = torch.cat([base.permute(0, 2, 3, 1).to(torch.uint8)[:, None], tiles], 1)
    values = normalise(pixels.flatten(0, 1).numpy())
    return {"pixel_values": values.unflatten(0, pixels.shape[:2]), "image_sizes": sizes}


def encode(model, family: str, batch: list[Example]) -> list[list[torch.Tensor]]:
    """Visual tokens `(n, d)` of each example's images, or of its video, by the stock model's own code."""
    inputs = visual_inputs(family, batch)
    if batch[0].video:
        return [[video] for video in model.model.get_video_features(**inputs, return_dict=True).pooler_output]
    features = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    count = len(batch[0].images)
    return [list(features[i : i + count]) for i in range(0, len(features), count)]


def token_centres(family: str, example: Example) -> torch.Tensor:
    """`(n, 2)`: row and column, in the image's patches, of each visual token's centre; NaN where it has none."""
    rows, columns = example.labels[0].shape
    side = TILE[family] // PATCH
    if family == "llava":
        return grid_centres(rows, columns, side, side)
    if family == "llava_next":
        ends = torch.cat([grid_centres(rows, 1, rows, 1), torch.full((rows, 1), torch.nan)], 1)[:, [0, 2]]
        tiles = grid_centres(rows, columns, rows, columns).view(rows, columns, 2)
        tiles = torch.cat([tiles, ends[:, None]], 1).flatten(0, 1)
        return torch.cat([grid_centres(rows, columns, side, side), tiles])
    end = torch.full((1, 2), torch.nan)
    if example.video:
        return torch.cat([grid_centres(rows, columns, (side + 1) // 2, (side + 1) // 2)] * len(example.images) + [end])
    return torch.cat([torch.cat([grid_centres(rows, columns, side, side), end])] * len(example.images))


def grid_centres(height: float, width: float, rows: int, columns: int) -> torch.Tensor:
    y, x = (torch.arange(rows) + 0.5) * height / rows, (torch.arange(columns) + 0.5) * width / columns
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)


def digit_shares(family: str, example: Example) -> torch.Tensor:
    """`(n,)`: share of each visual token's patches that a digit touches, 0 for row ends. One of a base image or of a
    pooled frame covers several."""
    labels, side = [torch.from_numpy(label < 10).float()[None] for label in example.labels], TILE[family] // PATCH
    if family == "llava":
        return labels[0].flatten()
    if family == "llava_next":
        return torch.cat([F.adaptive_avg_pool2d(labels[0], side).flatten(), F.pad(labels[0], (0, 1)).flatten()])
    if example.video:
        return torch.cat([F.avg_pool2d(label, data.POOLED).flatten() for label in labels] + [torch.zeros(1)])
    return torch.cat([F.pad(label.flatten(), (0, 1)) for label in labels])


def window_mask(random, centres: torch.Tensor, digit: torch.Tensor, example: Example) -> torch.Tensor:
    """Which tokens lie in the example's window, every other time without some of those that touch no digit. Row ends
    stay."""
    top, left, height, width = example.window
    low, high = torch.tensor([top, left]), torch.tensor([top + height, left + width])
    mask = ~((centres < low) | (centres >= high)).any(1)
    if random.random() < 0.5:
        gaps = torch.from_numpy(random.random(len(mask)) < random.random())
        mask &= ~gaps | (digit > 0) | centres.isnan().any(1)
    return mask


def answer(model, tokenizer, features: list[list[torch.Tensor]], batch: list[Example]):
    """Ask an example's questions side by side: they share its images and do not see each other (a mask of blocks).

    Returns:
        The loss; per question whether every answer token, the end included, is the likeliest (what greedy decoding
        would say); and the same `(batch, questions)`.
    """
    head, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in ("<s>USER:", " ASSISTANT:"))
    captions = [tokenizer(caption, add_special_tokens=False).input_ids for caption in batch[0].captions()]
    rows = []
    for images, example in zip(features, batch):
        prefix = len(head) + sum(map(len, captions)) + sum(map(len, images))
        ids, blocks, targets, positions = [], [0] * prefix, [-100] * prefix, list(range(prefix))
        for number, (_, question, reply) in enumerate(example.questions, start=1):
            asked = tokenizer(question).input_ids + tail
            said = [*tokenizer(reply).input_ids, tiny_checkpoint.EOS]
            ids += asked + said[:-1]
            blocks += [number] * (len(asked) + len(said) - 1)
            targets += [-100] * (len(asked) - 1) + said
            positions += range(prefix, prefix + len(asked) + len(said) - 1)
        rows.append((ids, blocks, targets, positions))
    longest = max(len(blocks) for _, blocks, _, _ in rows)
    embed = model.get_input_embeddings()
    said = [embed(torch.tensor(words, dtype=torch.long)) for words in captions]
    said[0] = torch.cat([embed(torch.tensor(head)), said[0]])
    embeds, block, target, position = [], *(torch.full((len(rows), longest), fill) for fill in (-1, -100, 0))
    for row, (images, (ids, blocks, targets, positions)) in enumerate(zip(features, rows)):
        seen = [part for pair in zip(said, images, strict=True) for part in pair]
        whole = torch.cat([*seen, embed(torch.tensor(ids))])
        embeds.append(F.pad(whole, (0, 0, 0, longest - len(blocks))))
        for table, values in ((block, blocks), (target, targets), (position, positions)):
            table[row, : len(values)] = torch.tensor(values)
    mask = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    mask = (mask & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]
    hidden = model.model.language_model(
        inputs_embeds=torch.stack(embeds), attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state
    asked = target != -100
    logits, wanted = model.lm_head(hidden[asked]).float(), target[asked]
    wrong = torch.zeros(len(rows), len(batch[0].questions) + 1).index_put_(
        (torch.nonzero(asked)[:, 0], block[asked]), (logits.argmax(-1) != wanted).float(), accumulate=True
    )
    right = wrong[:, 1:] == 0
    names = [kind for kind, _, _ in batch[0].questions]  # the first of a kind is what is evaluated
    return F.cross_entropy(logits, wanted), dict(zip(names[::-1], right.T.flip(0))), right


def rate(step: int, steps: int) -> float:
    """Of the learning rate: 60 steps up, then along a cosine down to 3%."""
    return min(1, (step + 1) / 60) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps))))


@torch.no_grad()
def look_at_neighbours(tower, config, scale: float = 2.0) -> None:
    """Initial values only: positions as sines and cosines of row and column, and in the first three layers heads that
    look at the neighbouring patches. A tower this small learns digits from few pictures only with such a start."""
    side, width = vision_side(config), config.hidden_size // config.num_attention_heads
    tower = getattr(tower, "vision_model", tower)
    periods = torch.tensor([24.0, 12, 8, 6, 4, 3])[: width // 4]
    frequencies, count = 2 * math.pi / periods, len(periods)
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    waves = [torch.stack([(v[..., None] * frequencies).cos(), (v[..., None] * frequencies).sin()], -1) for v in (y, x)]
    table = torch.cat([wave.flatten(-2) for wave in waves], -1).flatten(0, 1)
    size = table.shape[1]
    if config.model_type.startswith("siglip"):  # its own initial values drown these: CLIP's scale instead
        tower.embeddings.position_embedding.weight.normal_(std=0.02)
        for layer in tower.encoder.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight.normal_(std=0.036)
    tower.embeddings.position_embedding.weight[-(side**2) :, :size] = 0.7 * table
    straight, diagonal = [(0, 1), (0, -1), (1, 0), (-1, 0)], [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    for layer, offsets in zip(tower.encoder.layers, (straight, diagonal, straight)):
        for head, offset in enumerate(offsets):
            turn = torch.zeros(size, size)
            for axis, delta in enumerate(offset):
                for k, frequency in enumerate(frequencies.tolist()):
                    at, angle = 2 * (axis * count + k), -delta * frequency
                    turn[at : at + 2, at : at + 2] = torch.tensor(
                        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
                    )
            part = slice(head * width, (head + 1) * width)
            layer.self_attn.q_proj.weight[part, :size] += scale * torch.eye(size)[:width]
            layer.self_attn.k_proj.weight[part, :size] += scale * turn[:width]


def main(
    folder: Annotated[Path, typer.Argument(help="Where log, state and the checkpoints `answer` and `window` go.")],
    family: Annotated[str, typer.Option(help=f"One of {', '.join(STAGES)}.")] = "llava_next",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    window: Annotated[bool, typer.Option(help="Whether the window stage runs.")] = True,
    shorten: Annotated[float, typer.Option(min=1, help="Divide every stage's steps by this: a smoke run.")] = 1,
) -> None:
    """Train a small LLaVA from scratch on digits among decoys."""
    if family not in STAGES:
        raise typer.BadParameter(f"--family is one of {', '.join(STAGES)}, not {family}.")
    torch.set_num_threads(1)
    stages = [stage for stage in STAGES[family] if window or stage.name != "window"]
    stages = tuple(Stage(s.name, max(1, round(s.steps / shorten)), s.lr, s.batch) for s in stages)
    trainer = Trainer(family, seed, folder, stages)
    trainer.run()
    print(f"{folder}: {trainer.spent:.0f} CPU seconds")
