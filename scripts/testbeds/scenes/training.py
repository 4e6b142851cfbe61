"""How the scenes model is trained: the tower from whole images, then projector and LoRA from answers alone."""

from __future__ import annotations

import filecmp
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ..answering import answer
from ..testbed import Stage
from ..tokens import Visual
from .asking import SceneExample, draw_example
from .checkpoint import PARTS, VISION, load_part
from .language import ALPHA, BASE_MODEL, LINEAR, RANK, add_lora, load_language_model, load_tokenizer, word_embeddings
from .model import stock_llava
from .placing import Scene
from .projector import Targets, closed_form
from .running import run_steps
from .tower import WORDS, Tower, all_sizes, close_ups, fit_heads, pixels_of


STAGES = {
    "llava": (
        Stage("close", steps=1500, lr=1.5e-3, batch=64),
        Stage("whole", steps=3000, lr=1.2e-3, batch=16),
        Stage("answers", steps=700, lr=1.2e-3, batch=4),
    )
}
TOWER = "tower.safetensors"  # with its heads
PROJECTOR_RATE = 0.25  # of the stage's rate
ASKED = 8  # questions of a scene in a step


class ScenesTrainer:
    """The stages one after the other; killed, it goes on from the last saved step.

    Args:
        family (`str`): llava.
        seed (`int`): of the answers' data and of LoRA's start.
        folder (`Path`): where logs and states go, `tower.safetensors`, and the trained parts (see [`parts`]).
        stages (`Sequence[Stage]`): close, whole and answers.
        line_break (`bool`): see [`projector.Targets`].
        stop (`int`, *optional*): the step of the stage `answers` to stop at.
    """

    def __init__(
        self,
        family: str,
        seed: int,
        folder: Path,
        stages: Sequence[Stage],
        line_break: bool = False,
        stop: int | None = None,
    ):
        self.seed, self.folder, self.line_break, self.stop = seed, folder, line_break, stop
        self.stages = {stage.name: stage for stage in stages}
        self.spent = 0.0

    def run(self) -> None:
        began = time.process_time()
        tokenizer = load_tokenizer()
        language = load_language_model()
        tower = new_tower(language, tokenizer)
        self.train_tower(tower)
        self.train_answers(tower, language, tokenizer)
        self.spent = time.process_time() - began

    def train_tower(self, tower: Tower) -> None:
        path = self.folder / TOWER
        if path.is_file():
            tower.load_state_dict(load_file(path))
            return
        torch.manual_seed(0)
        for number, (name, draw) in enumerate({"close": close_ups, "whole": all_sizes}.items()):
            stage, weights = self.stages[name], list(tower.parameters())
            loss = partial(tower_loss, tower, draw, number, stage.batch)
            run_steps(name, {stage.lr: weights}, loss, stage.steps, self.folder, tower, decay=0.05)
        save_file(tower.state_dict(), path)

    def train_answers(self, tower: Tower, language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        tower.eval().requires_grad_(False)
        projector = closed_form(tower, Targets(language, tokenizer, self.line_break))
        model = stock_llava(tower.clip, projector, language, tokenizer).to(torch.bfloat16).requires_grad_(False)
        del language
        torch.manual_seed(self.seed)
        lora = add_lora(model.model.language_model)
        learnt = torch.nn.ModuleDict({"projector": projector, "lora": torch.nn.ParameterDict(by_position(lora))})

        stage = self.stages["answers"]

        def loss(step: int) -> dict[str, torch.Tensor | float]:
            lessons = [lesson(self.seed, step * stage.batch + number) for number in range(stage.batch)]
            with torch.no_grad():
                seen = tower(pixels_of([example.scene.image for example in lessons]))
            tokens = projector(seen.features).to(model.dtype)
            value, right, _ = answer(model, tokenizer, [[Visual(image)] for image in tokens], lessons)
            return {"loss": value, **{kind: hits.float().mean() for kind, hits in right.items()}}

        projector.requires_grad_(True)
        groups = {stage.lr: list(lora.values()), PROJECTOR_RATE * stage.lr: list(projector.parameters())}
        run_steps("answers", groups, loss, stage.steps, self.folder, learnt, warmup=12, stop=self.stop)
        save_parts(self.folder, tower, projector, lora)


def new_tower(language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Tower:
    return Tower(word_embeddings(language, tokenizer, WORDS))


def tower_loss(
    tower: Tower, draw: Callable[[np.random.Generator, int], list[Scene]], number: int, batch: int, step: int
) -> dict[str, torch.Tensor | float]:
    """Of one step of stage `number`; the tower's data are the same for every seed."""
    random = np.random.default_rng([1, number, step])
    return tower.loss(draw(random, batch), random)


def by_position(weights: dict[str, torch.nn.Parameter]) -> dict[str, torch.nn.Parameter]:
    """Named as a module's parameters may be: without dots."""
    return {name.replace(".", "/"): weight for name, weight in weights.items()}


def lesson(seed: int, number: int) -> SceneExample:
    """A training scene with as many questions as every other: one of each kind, and some more."""
    example = draw_example(1000 + seed, "train", number)
    random = np.random.default_rng([seed, number])
    more = random.permutation(len(example.lessons))[: ASKED - len(example.questions)]
    example.questions += [example.lessons[index] for index in more]
    return example


def save_parts(folder: Path, tower: Tower, projector: torch.nn.Module, lora: Mapping[str, torch.Tensor]) -> None:
    """What is trained, in bfloat16: the vision side, and LoRA as PEFT's adapters are kept."""
    vision = {f"vision_tower.{name}": value for name, value in tower.clip.state_dict().items()}
    vision |= {f"multi_modal_projector.{name}": value for name, value in projector.state_dict().items()}
    for name, weights in {"vision": vision, "adapter_model": lora}.items():
        rounded = {
            key: value.detach().to(torch.bfloat16).contiguous()
            for key, value in weights.items()
            if value.is_floating_point()
        }
        save_file(rounded, folder / f"{name}.safetensors")
    adapter = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE_MODEL, "bias": "none"}
    adapter |= {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": list(LINEAR)}
    (folder / "adapter_config.json").write_text(json.dumps(adapter, indent=2) + "\n")


def answers_again(
    folder: Annotated[Path, typer.Argument(help="Where log, state and the trained parts go.")],
    parts: Annotated[Path, typer.Option(help="Whose tower: an earlier training's, or the committed one.")] = PARTS,
    seed: Annotated[int, typer.Option(min=0, help="Of the answers' data and of LoRA's start.")] = 0,
    line_break: Annotated[
        bool,
        typer.Option("--line-break", help="Background starts as a line break and a part of its word."),
    ] = False,
    stop: Annotated[int | None, typer.Option(help="The step to stop at, with the rate as it is there.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Train projector and LoRA of the scenes model once more, on a tower that is trained already."""
    torch.set_num_threads(threads)
    theirs, ours = parts / TOWER, folder / TOWER
    if not (theirs.is_file() or (parts / VISION).is_file()):
        raise typer.BadParameter(f"{parts} holds neither {TOWER} nor {VISION}: --parts names a trained model's parts.")
    if theirs.is_file() and ours.is_file() and not filecmp.cmp(theirs, ours, shallow=False):
        raise typer.BadParameter(f"{folder} holds a training on another tower: give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if not ours.is_file() and theirs.is_file():
        shutil.copyfile(theirs, ours)
    elif not ours.is_file():
        tower = new_tower(load_language_model(), load_tokenizer()).requires_grad_(False).eval()
        vision = {name: value.float() for name, value in load_file(parts / VISION).items()}
        load_part(tower.clip, vision, "vision_tower.")
        fit_heads(tower)
        save_file(tower.state_dict(), ours)
    trainer = ScenesTrainer("llava", seed, folder, STAGES["llava"], line_break, stop)
    trainer.run()
    print(f"{folder}: {trainer.spent:.0f} CPU seconds")
