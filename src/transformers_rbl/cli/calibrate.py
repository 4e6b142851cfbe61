"""`rbl calibrate`: which setting to use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from tqdm import tqdm

from .shared import (
    KEEP_RATIOS,
    AnyModel,
    Codebook,
    Device,
    Dtype,
    Split,
    Suffix,
    app,
    check_metrics,
    load_pruned,
    one_sentence,
)


if TYPE_CHECKING:
    from PIL.Image import Image

    from ..building.images import ImageSource


@app.command()
@one_sentence
def calibrate(
    model: AnyModel,
    codebook: Codebook = None,
    images: Annotated[str | None, typer.Option(help="Unlabelled images: finds a threshold for --retention.")] = None,
    retention: Annotated[float, typer.Option(help="Mean share of visual tokens to keep, row ends aside.")] = 0.15,
    data: Annotated[
        str | None, typer.Option(help="Labelled questions: finds the lowest ratio that keeps --share.")
    ] = None,
    share: Annotated[float, typer.Option(help="Of the unpruned accuracy.")] = 0.97,
    keep_ratio: Annotated[list[float] | None, typer.Option(help="Ratios to try on --data. Repeat.")] = None,
    metric: Annotated[str, typer.Option(help="exact, normalised, choice or yes_no.")] = "normalised",
    image_column: Annotated[str, typer.Option()] = "image",
    question_column: Annotated[str, typer.Option()] = "question",
    answer_column: Annotated[str, typer.Option()] = "answer",
    split: Split = "train",
    limit: Annotated[int | None, typer.Option(min=2, help="Images or questions at most.")] = None,
    suffix: Suffix = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    write: Annotated[bool, typer.Option(help="Write the setting into the --codebook folder as recommended.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Which setting to use: a threshold for a mean retention, or the lowest ratio that keeps an accuracy."""
    from ..building.images import ImageSource
    from ..evaluation.calibrate import image_scores, lowest_retention, threshold_for
    from ..evaluation.evaluate import evaluate as ask_under_rules
    from ..evaluation.questions import question_count, read_questions
    from ..hub.cards import save_with_card
    from ..models.codebook import RedundancyCodebook
    from ..models.pruning import PruningConfig

    if (images is None) == (data is None):
        raise ValueError("Give --images (unlabelled) or --data (questions with answers).")
    check_metrics([metric])
    if not 0 < share <= 1:
        raise ValueError(f"--share is of the unpruned accuracy, in (0, 1]; got {share}.")
    if write and (codebook is None or not Path(codebook).is_dir()):
        raise ValueError("--write needs --codebook, a folder.")
    loaded, processor = load_pruned(model, codebook, dtype, device)
    if loaded.codebook is None:
        raise ValueError(f"{model} has no codebook: give --codebook.")
    console = Console()
    if images is not None:
        source = ImageSource(images, image_column, split, limit=limit)
        broken: list[str] = []
        opened = tqdm(readable(source, broken), total=len(source), unit="image")
        scores = image_scores(loaded, processor, opened)
        if broken and not scores:
            raise ValueError(f"None of {len(broken)} images could be read (the first, {broken[0]}).")
        if broken:
            console.print(f"{len(broken)} images could not be read and were left out (the first, {broken[0]}).")
        fit = threshold_for(scores, retention)
        rule = PruningConfig(threshold=fit.threshold)
        fitted, checked = fit.images
        console.print(
            f"threshold [bold]{fit.threshold:.4f}[/bold] keeps {fit.fitted:.1%} of the visual tokens (row ends "
            f"aside) of {fitted} images it was fitted on, and {fit.checked:.1%} of {checked} others: overshoot "
            f"{fit.overshoot:+.1%}"
        )
    else:
        assert data is not None  # one of both is given
        rules = [PruningConfig(keep_ratio=ratio) for ratio in keep_ratio or KEEP_RATIOS]
        questions = read_questions(data, image_column, question_column, answer_column, split, limit)
        progress = tqdm(questions, unit="question", total=question_count(data, split, limit))
        results, references = ask_under_rules(loaded, processor, progress, rules, [metric], max_new_tokens, suffix)
        lowest = lowest_retention(results, share, metric)
        if lowest is None:
            raise ValueError(f"None of these ratios keeps {share:.0%} of the unpruned accuracy: try higher ones.")
        best, low, high = lowest
        rule = PruningConfig.from_dict(best.pruning)
        console.print(
            f"[bold]{best.name}[/bold] keeps {best.retention:.1%} of the visual tokens (row ends aside) and "
            f"{share:.0%} or more of the unpruned accuracy (95% interval {low:.1%} to {high:.1%}, {len(references)} "
            "questions).\n"
            "It was chosen on these questions: confirm it on others."
        )
    if write and codebook is not None:
        book = RedundancyCodebook.from_pretrained(codebook)
        book.recommended_keep_ratio, book.recommended_threshold = rule.keep_ratio, rule.threshold
        save_with_card(book, Path(codebook))
        console.print(f"written into {codebook}")


def readable(source: ImageSource, broken: list[str]) -> Iterator[Image]:
    """The images that can be read; of the others, name and reason go to `broken`."""
    for _, name, image in source.items(range(len(source))):
        if isinstance(image, Exception):
            broken.append(f"{name}: {type(image).__name__}: {image}".splitlines()[0])
        else:
            yield image
