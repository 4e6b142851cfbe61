"""The results page's pictures: what each token says alone, what rules keep, and where the codebook loses to the oracle.

python scripts/testbeds scenes-pictures docs/results/scenes --results docs/results/scenes/test.json
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from transformers_rbl import PruningConfig, rbl_class

from ..answering import CHATML
from .asking import SceneExample, draw_example
from .checkpoint import assembled
from .comparing import Encoded, Rule, library_rule, oracle
from .concepts import CONCEPTS, LABELS
from .placing import GRID, PATCH
from .tables import Results


if TYPE_CHECKING:
    from matplotlib.axes import Axes


QUESTION = "What is in the picture?"
UNLICENSED = ("moon", "garage")  # photos whose licence nothing states: in no picture
RATIO = 0.15


@torch.no_grad()
def said_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: torch.Tensor, question: str = QUESTION
) -> list[tuple[str, float]]:
    """What the model answers where each of the tokens `(n, d)` is the whole image, and how probable it finds the first
    word of it, articles aside."""
    ids = [
        tokenizer(part, add_special_tokens=False).input_ids
        for part in (CHATML.head, CHATML.after + question + CHATML.tail)
    ]
    embed = model.get_input_embeddings()
    head, tail = (embed(torch.tensor(part)).expand(len(tokens), -1, -1) for part in ids)
    prompt = torch.cat([head, tokens[:, None].to(head.dtype), tail], 1)
    end, article = model.config.text_config.eos_token_id, tokenizer("a", add_special_tokens=False).input_ids[0]
    answers, sure = [[] for _ in tokens], [0.0] * len(tokens)
    for _ in range(4):
        logits = model.model.language_model(inputs_embeds=prompt, use_cache=False).last_hidden_state[:, -1]
        best, word = model.lm_head(logits).float().softmax(-1).max(-1)
        for row, (probability, token) in enumerate(zip(best.tolist(), word.tolist())):
            if end not in answers[row]:
                if all(before == article for before in answers[row]) and token != article:
                    sure[row] = probability
                answers[row].append(token)
        prompt = torch.cat([prompt, embed(word)[:, None]], 1)
    return [
        (tokenizer.decode([token for token in answer if token != end]), probability)
        for answer, probability in zip(answers, sure)
    ]


@torch.no_grad()
def nearest_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tokens: torch.Tensor, count: int = 3
) -> list[list[str]]:
    """The word embeddings nearest to each token, by cosine."""
    table = torch.nn.functional.normalize(model.get_input_embeddings().weight.float(), dim=-1)
    near = (torch.nn.functional.normalize(tokens.float(), dim=-1) @ table.T).topk(count).indices
    return [[tokenizer.decode([word]) for word in row] for row in near.tolist()]


def token_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, examples: Sequence[SceneExample], each: int
) -> list[str]:
    """Markdown: of each kind of patch (things by their centre, background, clutter) what single tokens say."""
    lines = ["| patch shows | answer | p1 | nearest words |", "| --- | --- | --- | --- |"]
    encoded = Encoded(model, examples)
    chosen: dict[str, list[tuple[str, torch.Tensor]]] = {"thing": [], "background": [], "clutter": []}
    for example, tokens in zip(examples, encoded.tokens):
        label, cover = example.scene.label, example.scene.cover
        for name, _, _ in example.scene.things:
            place = int(np.argmax(np.where(label == CONCEPTS.index(name), cover, -1)))
            chosen["thing"].append((name, tokens[place]))
        for kind, word in (("background", example.scene.background), ("clutter", "clutter")):
            places = np.flatnonzero((label == LABELS.index(word)) & (cover == 0))
            if len(places):
                chosen[kind].append((word, tokens[places[len(places) // 2]]))
    for rows in chosen.values():
        names, tokens = zip(*rows[:each])
        stacked = torch.stack(tokens)
        said, near = said_alone(model, tokenizer, stacked), nearest_words(model, tokenizer, stacked)
        for name, (answer, sure), words in zip(names, said, near):
            lines.append(f"| {name} | {answer} | {sure:.2f} | {', '.join(repr(word) for word in words)} |")
    return lines


def draw_words(axis: Axes, example: SceneExample, words: Sequence[tuple[str, float]]) -> None:
    """The scene, each patch with what it says alone; the surer the bolder."""
    axis.imshow(example.images[0], alpha=0.55)
    for place, (answer, sure) in enumerate(words):
        y, x = divmod(place, GRID)
        text = answer.removeprefix("a ").removeprefix("an ").split(" and ")[0].split(",")[0][:10]
        axis.text(
            (x + 0.5) * PATCH, (y + 0.5) * PATCH, text, ha="center", va="center", fontsize=5, alpha=min(1, 0.25 + sure)
        )
    axis.set_axis_off()


def draw_kept(axis: Axes, example: SceneExample, mask: torch.Tensor, title: str) -> None:
    """The scene with dropped patches dimmed."""
    shown = np.kron(mask.view(GRID, GRID).numpy(), np.ones((PATCH, PATCH)))[..., None]
    axis.imshow(
        (example.images[0] * (0.15 + 0.85 * shown) + 200 * 0.85 * (1 - shown) * 0.9).clip(0, 255).astype(np.uint8)
    )
    axis.set_title(title, fontsize=7)
    axis.set_axis_off()


def main(
    folder: Annotated[Path, typer.Argument(help="Where the pictures go.")],
    results: Annotated[Path, typer.Option(help="A file of scenes-compare, for where the codebook loses.")],
    model_folder: Annotated[Path | None, typer.Option("--model", help="Default: put together on first use.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Scenes a picture.")] = 4,
) -> None:
    """Draw what tokens say and what rules keep, and print the table of single tokens."""
    from matplotlib.figure import Figure

    torch.set_num_threads(1)
    source = model_folder or assembled()
    model = rbl_class(source).from_pretrained(source, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    compared = Results(results)
    split, seed, count = (compared.about[name] for name in ("split", "seed", "examples"))
    examples = [draw_example(seed, split, number) for number in range(count)]
    allowed = [number for number, example in enumerate(examples) if example.scene.background not in UNLICENSED]
    print("\n".join(token_rows(model, tokenizer, [examples[number] for number in allowed[:24]], 14)))
    folder.mkdir(parents=True, exist_ok=True)

    two = [examples[number] for number in allowed if len(examples[number].scene.things) > 2][:2]
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    for axis, example, tokens in zip(figure.subplots(1, 2), two, Encoded(model, two).tokens):
        draw_words(axis, example, said_alone(model, tokenizer, tokens))
    figure.savefig(folder / "words.png", dpi=120)

    name = next(name for name in compared.names if name.startswith("codebook: "))
    gap = compared.scenes("oracle", RATIO) - compared.scenes(name, RATIO)
    losing = [number for number in np.argsort(-gap, kind="stable") if number in set(allowed)][:rows]
    rules: dict[str, Rule] = {
        "oracle": oracle(RATIO),
        "codebook": library_rule(PruningConfig(keep_ratio=RATIO)),
        "diversity": library_rule(PruningConfig(keep_ratio=RATIO, score="diversity")),
        "random": library_rule(PruningConfig(keep_ratio=RATIO, score="random")),
    }
    for picture, numbers in {"kept.png": allowed[:rows], "losing.png": losing}.items():
        shown = [examples[number] for number in numbers]
        encoded = Encoded(model, shown)
        figure = Figure(figsize=(10, 2.2 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), len(rules) + 1, squeeze=False)
        for row, example in enumerate(shown):
            axes[row, 0].imshow(example.images[0])
            axes[row, 0].set_axis_off()
            axes[row, 0].set_title(example.questions[0][2], fontsize=6)
        for column, (rule_name, rule) in enumerate(rules.items(), start=1):
            masks = rule(encoded)[1]
            for row, (example, number) in enumerate(zip(shown, numbers)):
                stored = name if rule_name == "codebook" else rule_name
                right = sum(map(int, compared.rows[stored, RATIO]["right"][number]))
                draw_kept(
                    axes[row, column], example, masks[row], f"{rule_name}: {right} of {len(example.questions)} right"
                )
        figure.savefig(folder / picture, dpi=90)
