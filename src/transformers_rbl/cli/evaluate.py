"""`rbl evaluate`: what pruning costs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from .output import claim
from .shared import (
    KEEP_RATIOS,
    AnyModel,
    Codebook,
    Device,
    Dtype,
    Overwrite,
    Split,
    Streaming,
    Suffix,
    app,
    check_metrics,
    check_placement,
    load_pruned,
    need_matplotlib,
    one_sentence,
)


@app.command()
@one_sentence
def evaluate(
    model: AnyModel,
    data: Annotated[str, typer.Option(help="JSON Lines file, or a datasets dataset (Hub id or local).")],
    out: Annotated[Path, typer.Option(help="Folder for results.md, results.json and accuracy.png.")],
    codebook: Codebook = None,
    score: Annotated[
        list[str] | None,
        typer.Option(help="Scores to compare, or all that this model can run; default cosine. Repeat."),
    ] = None,
    merge: Annotated[
        list[str] | None, typer.Option(help="none, nearest: what becomes of dropped tokens; default none. Repeat.")
    ] = None,
    keep_ratio: Annotated[list[float] | None, typer.Option(help="Ratios, for every score. Repeat.")] = None,
    threshold: Annotated[list[float] | None, typer.Option(help="Cosine thresholds. Repeat.")] = None,
    tiles: Annotated[str, typer.Option(help="all, base or where_needed.")] = "all",
    newlines: Annotated[str, typer.Option(help="all, row or last.")] = "all",
    keep_positions: Annotated[
        bool, typer.Option("--keep-positions", help="What stays keeps its positions; by default gaps close.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of score random.")] = 0,
    metric: Annotated[
        list[str] | None, typer.Option(help="exact, normalised, choice, yes_no; default normalised.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column with an image, or a list of them.")] = "image",
    question_column: Annotated[str, typer.Option()] = "question",
    answer_column: Annotated[str, typer.Option(help="An answer, or a list of accepted ones.")] = "answer",
    split: Split = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions at most.")] = None,
    streaming: Streaming = False,
    suffix: Suffix = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered side by side.")] = 1,
    dtype: Dtype = "auto",
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """What pruning costs: accuracy against retention, for many rules on one pass over the images."""
    from ..evaluation.evaluate import evaluate as ask_under_rules
    from ..evaluation.evaluate import prompt_inputs, refusal, table_rows, write_results
    from ..evaluation.questions import question_count, read_questions
    from ..evaluation.results import WORDS
    from ..models.pruning import PruningConfig
    from ..models.scorers import SCORERS

    need_matplotlib()
    metrics = metric or ["normalised"]
    check_metrics(metrics)
    if score and threshold and not keep_ratio:
        raise ValueError("--threshold is for score cosine: give --keep-ratio for --score, or leave --score out.")
    ratios = keep_ratio or (() if threshold else KEEP_RATIOS)
    every = "all" in (score or ())
    if every and len(score or ()) > 1:
        raise ValueError("--score all takes every score: leave the others out.")
    shared = {"tiles": tiles, "newlines": newlines, "keep_positions": keep_positions, "seed": seed}
    rules = [
        PruningConfig(keep_ratio=ratio, score=name, merge=merging, **shared)
        for name in (SCORERS if every else score or ["cosine"])
        for merging in merge or ["none"]
        for ratio in ratios
    ]
    rules += [
        PruningConfig(threshold=value, merge=merging, **shared)
        for merging in merge or ["none"]
        for value in threshold or ()
    ]
    if streaming and limit is None:
        raise ValueError("A streamed dataset has no known length: give --limit.")
    check_placement(dtype, device)
    claim(out, ("results.md", "results.json", "accuracy.png"), overwrite)
    count = question_count(data, split, limit, streaming)
    loaded, processor = load_pruned(model, codebook, dtype, device)
    questions = read_questions(data, image_column, question_column, answer_column, split, limit, streaming)
    refused: dict[str, str] = {}
    if every:
        first = next(questions, None)
        if first is None:
            raise ValueError("There are no questions to ask.")
        questions = itertools.chain([first], questions)
        prompt = prompt_inputs(processor, first, suffix, loaded.device, loaded.dtype)
        tried = {rule.score: refusal(loaded, prompt, rule) for rule in rules}
        refused = {name: sentence for name, sentence in tried.items() if sentence is not None}
        rules = [rule for rule in rules if rule.score not in refused]
        if not rules:
            raise ValueError(f"This model can run no rule: {next(iter(refused.values()))}")
    for rule in rules:
        loaded.check_pruning(rule)  # a rule that needs a codebook ends here where there is none
    progress = tqdm(questions, unit="question", total=count)
    results, references = ask_under_rules(
        loaded, processor, progress, rules, metrics, max_new_tokens, suffix, batch_size
    )
    about = {
        "model": model,
        "codebook": codebook or "the checkpoint's",
        "data": data,
        "questions": len(references),
        "device": f"{loaded.device}, {loaded.dtype}",
        **{f"not run: {name}": sentence for name, sentence in refused.items()},
    }
    write_results(out, results, references, about)
    columns, rows = table_rows(results, references)
    table = narrow_table(f"{model} on {data}, {len(references)} questions; [95% interval]", columns, rows)
    Console().print(table)
    Console().print(WORDS)
    for name, sentence in refused.items():
        Console().print(escape(f"{name} was not run: {sentence}"))
    Console().print(f"[bold]{out / 'results.md'}[/bold], results.json, accuracy.png")


def narrow_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """Results for a terminal of 80 columns: intervals go below what they are of."""
    table = Table(title=escape(title), box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(escape(column.replace(" ", "\n")), justify="right", no_wrap=True)
    for name, *figures in rows:
        table.add_row(escape(name), *(escape(figure.replace(" ", "\n")) for figure in figures))
    return table
