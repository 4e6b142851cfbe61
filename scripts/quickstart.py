"""Ask a vision-language model about images, stock and pruned: both answers, visual tokens, KV cache, prefill time, a
picture, and accuracy over more questions.

python scripts/quickstart.py                  # a small trained model of this repository
python scripts/quickstart.py --model llava-hf/llama3-llava-next-8b-hf --codebook org/book --image a.jpg
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor

from testbeds.digits.questions import examples
from testbeds.scenes import assembled, questions
from testbeds.scenes.asking import correct as names_the_same
from transformers_rbl import PruningConfig, rbl_class
from transformers_rbl.evaluation.evaluate import evaluate, prompt_text, refusal, table_rows
from transformers_rbl.evaluation.metrics import METRICS
from transformers_rbl.evaluation.plots import plot_kept
from transformers_rbl.evaluation.questions import Question
from transformers_rbl.evaluation.timing import compare_prefills
from transformers_rbl.inputs import image_arguments, image_runs, layout_of
from transformers_rbl.wording import describe_pruning


OFF = PruningConfig(enabled=False)
DIGITS = Path(__file__).resolve().parents[1] / "codebooks" / "digits-llava-next"
PROMPT = "What is shown in this image?"
SCENES_SCORED, DIGITS_SCORED = 60, 240  # questions: a language model of 135M takes a second or two for each
BASELINES = ("random", "cls_attention")  # at the codebook's retention, where the model can


@dataclass
class Show:
    """What is shown of a model: its folder or Hub id, two questions to look at closely, and more to count.

    Args:
        about (`str`): what the model is, and what it is not.
        shown (`list[Question]`): the first of its test split, never picked by hand; without answers for photos of the
            user's.
        scored (`list[Question]`): test questions, by which accuracy is counted.
        correct (`Callable[[str, str], bool]`): whether what it said is a true answer.
    """

    model: str | Path
    about: str
    shown: list[Question]
    scored: list[Question]
    correct: Callable[[str, str], bool] = lambda said, true: bool(METRICS["normalised"](said, [true]))


def scenes(count: int) -> Show:
    """SmolLM2-135M behind a small tower, asked in English about drawings on photos.

    Raises:
        RuntimeError: if the language model's wheel or the drawings cannot be had.
    """
    about = (
        "SmolLM2-135M with a small vision tower, trained on synthetic scenes: drawings of 65 things on photos and "
        "walls. It knows no other pictures. Things may be named in any order."
    )
    rows = [Question([row["image"]], row["question"], [row["answer"]]) for row in questions("test", -(-count // 6))]
    return Show(assembled(), about, [rows[0], rows[6]], rows[:count], names_the_same)


def digits(count: int) -> Show:
    """A LLaVA-NeXT that was trained from scratch on digits, and needs nothing that is not in the repository."""
    about = (
        "A small LLaVA-NeXT, trained from scratch to read handwritten digits among decoys in synthetic images. It "
        "knows no other pictures. Digits are listed from small to large. It is so small that pruning saves it no time."
    )
    drawn = list(examples("llava_next", "image", "test", count, 11))
    asked = [[Question(example.pictures(), text, [reply]) for _, text, reply in example.questions] for example in drawn]
    return Show(DIGITS, about, [asked[0][0], asked[1][0]], [row for rows in asked for row in rows][:count])


def default_show(count: int | None, console: Console) -> Show:
    try:
        return scenes(count or SCENES_SCORED)
    except (RuntimeError, OSError) as error:
        console.print(f"[yellow]{first_line(error)}[/yellow] Digits are read in its place.")
        return digits(count or DIGITS_SCORED)


def sample_photos() -> list[Image.Image]:
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(photo) for photo in load_sample_images().images]


def run(
    show: Show,
    codebook: str | None,
    keep_ratio: float | None,
    threshold: float | None,
    max_new_tokens: int,
    repeats: int,
    out: Path,
    console: Console,
) -> None:
    """Both answers of every photo as a table, the picture at `out`, and accuracy."""
    dtype = "auto" if torch.cuda.is_available() or show.scored else "float32"  # half precision is slow on most CPUs
    model = rbl_class(show.model).from_pretrained(
        show.model, codebook=codebook, keep_ratio=keep_ratio, threshold=threshold, dtype=dtype
    )
    if model.pruning is None:
        raise ValueError(
            "No pruning setting: give --keep-ratio or --threshold, and --codebook unless the model has one."
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    processor = AutoProcessor.from_pretrained(show.model)
    console.print(show.about)

    rule = describe_pruning(model.pruning)
    table = Table(title=f"{Path(str(show.model)).name}, {rule}, {model.device}, {model.dtype}")
    for column in ("photo", "visual tokens", "KV cache", f"prefill, median of {repeats}", "answer"):
        table.add_column(column, overflow="fold", max_width=34)
    shown, masks, layouts = [], [], []
    for number, question in enumerate(show.shown, start=1):
        photo, true = question.images[0], question.answers
        text = prompt_text(processor, question.text, 1)
        inputs = processor(images=photo, text=text, return_tensors="pt").to(model.device, model.dtype)
        seconds, size, output = compare_prefills(model, inputs, {"stock": OFF, "pruned": None}, repeats)
        mask = torch.cat(list(output.keep_masks))  # a family that counts by tile has several for one photo
        layout = layout_of(
            model.model.layouts(**image_arguments(model, inputs)),
            [len(part) for part in output.keep_masks],
            image_runs(model, inputs.input_ids),
        )
        if layout is None:
            console.print(
                f"Where the {len(mask)} visual tokens of photo {number} lie in it, no processor tells: no picture."
            )
        else:
            shown.append(photo)
            masks.append(mask)
            layouts.append(layout)
        table.add_row(f"{number}", "", "", "", f"[italic]{question.text}[/italic]")
        for name, count, pruning in (("stock", len(mask), OFF), ("pruned", int(mask.sum()), None)):
            ids = model.generate(**inputs, pruning=pruning, max_new_tokens=max_new_tokens, do_sample=False)
            answer = processor.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0]
            verdict = "" if not true else "  ✓" if show.correct(answer, true[0]) else "  ✗"
            table.add_row(
                f"  {name}",
                str(count),
                f"{size[name] / 2**20:.2f} MiB",
                f"{seconds[name] * 1e3:.1f} ms",
                printable(answer) + verdict,
            )
        if true:
            table.add_row("  true", "", "", "", true[0])
        table.add_section()
    console.print(table)
    if shown:
        out.parent.mkdir(parents=True, exist_ok=True)
        plot_kept(shown, masks, layouts, out, ["synthetic image"] * len(shown) if show.scored else None)
        console.print(f"What was kept: [bold]{out}[/bold]")
    if show.scored:
        console.print(accuracy(show, model, processor, inputs, max_new_tokens))


def accuracy(show: Show, model, processor, inputs, max_new_tokens: int) -> Table:
    """Accuracy over the show's questions, unpruned, pruned, and by rules without a codebook at the same retention."""
    rules = [model.pruning, *(replace(model.pruning, score=score) for score in BASELINES)]
    rules = [rule for rule in rules if refusal(model, inputs, rule) is None]
    results, references = evaluate(model, processor, show.scored, rules, ["normalised"], max_new_tokens)
    for result in results:
        judged = [float(show.correct(said, true[0])) for said, true in zip(result.answers, references)]
        result.correct = {"accuracy": judged}
    columns, rows = table_rows(results, references)
    table = Table(title=f"{len(references)} test questions, 95% bootstrap intervals")
    for column in columns[:5]:
        table.add_column(column, overflow="fold", max_width=24)
    for row in rows:
        table.add_row(*row[:5])
    return table


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    return "".join(letter if letter.isprintable() and letter != "\ufffd" else "·" for letter in text)


def main(
    model: Annotated[
        str | None, typer.Option(help="Checkpoint of any family in docs/models.md: folder or Hub id.")
    ] = None,
    codebook: Annotated[
        str | None, typer.Option(help="Codebook: folder or Hub id; none for a saved RBL model.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A photo; repeat for more.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The question.")] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="Share of visual tokens to keep, in (0, 1].")] = None,
    threshold: Annotated[float | None, typer.Option(help="Keep tokens whose largest cosine is below this.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 24,
    repeats: Annotated[int, typer.Option(min=1, help="Timed prefills of each, interleaved.")] = 7,
    scored: Annotated[
        int | None, typer.Option(min=6, help="Test questions of the default model to count; default 60, of digits 240.")
    ] = None,
    digits_testbed: Annotated[bool, typer.Option("--digits", help="The model that needs no download.")] = False,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("outputs/quickstart.png"),
) -> None:
    """Stock and pruned answers side by side."""
    console = Console()
    try:
        if model is None:
            if codebook is not None:
                raise ValueError("--codebook belongs to a model: give --model too.")
            show = digits(scored or DIGITS_SCORED) if digits_testbed else default_show(scored, console)
        else:
            show = Show(model, f"{model}, asked about photos", [], [])
        if image or model is not None:
            photos = [Image.open(path).convert("RGB") for path in image or ()] or sample_photos()
            show.shown, show.scored = [Question([photo], prompt or PROMPT, []) for photo in photos], []
        elif prompt is not None:
            show.shown = [Question(question.images, prompt, []) for question in show.shown]
        run(show, codebook, keep_ratio, threshold, max_new_tokens, repeats, out, console)
    except (ValueError, OSError) as error:
        print(f"quickstart: {first_line(error)}", file=sys.stderr)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
