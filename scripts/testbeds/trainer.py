"""Training of a testbed's model in stages: deterministic, and going on where it was killed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin

from .testbed import Stage


TOWER = "tower"  # the stage that trains the vision tower, and that alone
SAVE_EVERY = 100  # steps


class Trainer:
    """One model, its stages, and what is needed to go on after a kill. A testbed says what is learnt: [`loss`].

    Args:
        model (`PreTrainedModel`): with its initial values.
        processor (`ProcessorMixin`): saved with it.
        tower (`list[torch.nn.Module]`): what of the model is its vision tower.
        heads (`list[torch.nn.Module]`): auxiliary ones of the first stage, thrown away.
        seed (`int`): of the data.
        folder (`Path`): where log, state and one checkpoint a stage go; none of the tower's stage.
        stages (`Sequence[Stage]`): the one named `TOWER` trains the vision tower and the heads, all others
            the projector and the language model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        tower: list[torch.nn.Module],
        heads: list[torch.nn.Module],
        seed: int,
        folder: Path,
        stages: Sequence[Stage],
    ):
        self.model, self.processor, self.tower = model, processor, tower
        self.seed, self.folder, self.stages = seed, folder, stages
        self.parts = torch.nn.ModuleList([model, *heads])
        self.spent = 0.0  # CPU seconds, over restarts

    def loss(self, random: np.random.Generator, stage: Stage, step: int) -> dict[str, torch.Tensor | float]:
        """The `"loss"` of one step, and what else the log should say of it."""
        raise NotImplementedError

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "state.pt"
        state = torch.load(path, weights_only=True) if path.exists() else None
        first = 0 if state is None else state["stage"]
        if state is not None:
            self.parts.load_state_dict(state["weights"])
            self.spent = state["spent"]
        for number in range(first, len(self.stages)):
            self.run_stage(number, state if state is not None and number == first else None)
        path.unlink(missing_ok=True)

    def run_stage(self, number: int, state: dict | None) -> None:
        """Stage `number`, from a saved state of it or from its beginning."""
        stage, began = self.stages[number], time.process_time() - self.spent
        tower = stage.name == TOWER
        self.parts.requires_grad_(tower)
        self.model.requires_grad_(True)
        for module in self.tower:
            module.requires_grad_(tower)
        weights = [p for p in self.parts.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=stage.lr, betas=(0.9, 0.98))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, stage.steps))
        start = 0
        if state is not None and state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            start = state["step"]
        with (self.folder / "log.jsonl").open("a") as log:
            for step in tqdm(range(start, stage.steps), initial=start, total=stage.steps, desc=stage.name):
                random = np.random.default_rng([self.seed, number, step])  # data by step: a restart draws the same
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    measures = self.loss(random, stage, step)
                    loss = measures.pop("loss")
                loss.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                self.spent = time.process_time() - began
                if step % 50 == 49 or step == stage.steps - 1:
                    row = {"stage": stage.name, "step": step + 1, "loss": loss.item(), **measures, "cpu_s": self.spent}
                    row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                if step % SAVE_EVERY == SAVE_EVERY - 1:
                    self.save_state(number, step + 1, optimizer.state_dict(), scheduler.state_dict())
        if not tower:
            self.save(self.folder / stage.name)
        self.save_state(number + 1, 0, None, None)

    def save_state(self, stage: int, step: int, optimizer: dict | None, scheduler: dict | None) -> None:
        """What `run` goes on from, whole or not at all."""
        state = {"stage": stage, "step": step, "weights": self.parts.state_dict(), "optimizer": optimizer}
        half = self.folder / "state.half"
        torch.save({**state, "scheduler": scheduler, "spent": self.spent}, half)
        half.replace(self.folder / "state.pt")

    def save(self, folder: Path) -> None:
        """The checkpoint in bfloat16, in Hub-repository form."""
        model, text = self.model, self.model.config.text_config
        model.generation_config = GenerationConfig(
            pad_token_id=text.pad_token_id, bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id
        )
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
        model.load_state_dict(weights)  # the next stage goes on from what is saved, rounded
        model.config.dtype = torch.bfloat16
        model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)


def rate(step: int, steps: int) -> float:
    """Of the learning rate: 60 steps up, then along a cosine down to 3%."""
    return min(1, (step + 1) / 60) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, step / steps))))
