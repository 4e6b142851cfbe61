"""`rbl`, the command line: build, inspect and convert codebooks; evaluate and calibrate pruned models."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from tqdm import tqdm

from ..building.images import ImageSource
from ..building.recipe import Recipe
from ..models.codebook import RedundancyCodebook
from ..models.pruning import PruningConfig


app = typer.Typer(help="Codebooks of redundant visual tokens for LLaVA models.", no_args_is_help=True)


def one_sentence(command):
    """Bad input ends a command with one sentence and status 2, not with a traceback."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, SafetensorError) as error:
            lines = str(error).strip().splitlines()
            print(f"rbl: {lines[0] if lines else type(error).__name__}", file=sys.stderr)
            raise typer.Exit(2) from None

    return run


@app.callback()
def main() -> None:
    """Codebooks of redundant visual tokens for LLaVA models."""


@app.command()
@one_sentence
def build(
    out: Annotated[Path, typer.Option(help="Folder for the codebook, its provenance, records and report.")],
    model: Annotated[str | None, typer.Option(help="Stock checkpoint: folder or Hub id.")] = None,
    images: Annotated[
        str | None, typer.Option(help="Folder, list file, or datasets dataset (Hub id or local).")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="YAML file, or a preset's name (a folder of codebooks/).")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE in place of the recipe's; repeat.")
    ] = None,
    from_records: Annotated[
        Path | None, typer.Option(help="Select again from an earlier build, without the model.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Of a dataset, the column with images.")] = "image",
    split: Annotated[str, typer.Option(help="Of a dataset.")] = "train",
    streaming: Annotated[bool, typer.Option(help="Read a Hub dataset without downloading it first.")] = False,
    max_tokens_per_batch: Annotated[int, typer.Option(min=1, help="Tokens computed in one forward pass.")] = 8192,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Spread one model over devices: auto, balanced …")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id to record; default --model, if it is one.")] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="Keep ratio to recommend, in (0, 1].")] = None,
    threshold: Annotated[float | None, typer.Option(help="Cosine threshold to recommend.")] = None,
) -> None:
    """Build a codebook: probe images with a model, cluster, select. A killed build goes on where it stopped.

    Over many processes: accelerate launch --num_processes N -m transformers_rbl.cli build …
    """
    from ..building.build import Processes, build_codebook, probe_images
    from ..building.records import Records, with_selection

    if (from_records is None) == (model is None):
        raise ValueError("Give --model and --images to probe, or --from-records to select again.")
    for value in ({"keep_ratio": keep_ratio}, {"threshold": threshold}):
        if None not in value.values():
            PruningConfig(**value)
    _need_matplotlib()
    processes = Processes()
    try:
        if from_records is not None:
            if processes.count > 1:
                raise ValueError("Selecting again from records takes one process.")
            if images is not None:
                raise ValueError("--from-records needs no --images.")
            known = from_records / "records"
            records = Records(known if known.is_dir() else from_records)
            chosen = _recipe(recipe, setting, records.run["recipe"])
            with_selection(records, chosen)
            probed, model = None, records.run["model"]["name"]
        else:
            if images is None or recipe is None:
                raise ValueError("--model needs --images and --recipe besides.")
            chosen = _recipe(recipe, setting)
            source = ImageSource(images, image_column, split, streaming, chosen.num_images)
            loaded, processor = _load(model, dtype, device or processes.device, device_map)
            folder = out / "records"
            probed = probe_images(loaded, processor, model, source, chosen, folder, max_tokens_per_batch, processes)
            if processes.index > 0:
                return
            records = Records(folder)
        if base_model is None and _is_hub_id(model):
            base_model = model
        book, selection = build_codebook(records, chosen, out, base_model, keep_ratio, threshold, probed)
        table = Table(title=str(out), show_header=False)
        if probed is not None:
            table.add_row(
                "images", f"{probed.new} probed, {probed.known} from records, {len(probed.skipped)} unreadable"
            )
            for name, why in probed.skipped[:5]:
                table.add_row("  unreadable", f"{name}: {why}")
        for name, count in selection.funnel:
            table.add_row(name, str(count))
        table.add_row("prototypes", " x ".join(map(str, book.prototypes.shape)))
        table.add_row("within 1e-5 of a threshold", str(len(selection.borderline)))
        words = list(book.built_with["words"].items())[:5]
        table.add_row("shown alone, the model says", ", ".join(f"{word!r} {count}x" for word, count in words))
        table.add_row("report", str(out / "report.md"))
        Console().print(table)
    finally:
        processes.end()


@app.command()
@one_sentence
def inspect(
    codebook: Annotated[str, typer.Argument(help="Codebook: folder or Hub id.")],
    images: Annotated[str | None, typer.Option(help="The images it was built from: draws a contact sheet.")] = None,
    image_column: Annotated[str, typer.Option(help="Of a dataset, the column with images.")] = "image",
    split: Annotated[str, typer.Option(help="Of a dataset.")] = "train",
    sheet: Annotated[Path, typer.Option(help="Where to write the contact sheet.")] = Path("contact-sheet.png"),
    rows: Annotated[int, typer.Option(min=0, help="Prototypes to list.")] = 10,
) -> None:
    """What is in a codebook: counts, norms, cosines, where its prototypes come from."""
    from ..building.inspection import contact_sheet, describe_codebook, provenance_of

    if images is not None:
        _need_matplotlib()
    book = RedundancyCodebook.from_pretrained(codebook)
    console = Console()
    table = Table(title=codebook, show_header=False)
    for name, value in describe_codebook(book).items():
        table.add_row(name, value)
    console.print(table)
    provenance = provenance_of(codebook)
    if provenance is None:
        console.print("No provenance table: the codebook was converted, or built elsewhere.")
    else:
        listed = Table(title=f"provenance, {min(rows, len(provenance))} of {len(provenance)} prototypes")
        columns = ("prototype", "image", "position", "p1", "divergence", "cluster", "unique_images", "word_1")
        for column in columns:
            listed.add_column(column, overflow="fold")
        for row in provenance[:rows]:
            listed.add_row(*(row[column] for column in columns))
        console.print(listed)
    if images is not None:
        if provenance is None:
            raise ValueError("A contact sheet needs the provenance table, which this codebook does not have.")
        shown, missing = contact_sheet(book, provenance, ImageSource(images, image_column, split), sheet)
        console.print(f"{shown} source patches: [bold]{sheet}[/bold]; {missing} images not found")


@app.command()
@one_sentence
def evaluate(
    model: Annotated[str, typer.Option(help="Stock or pruned checkpoint: folder or Hub id.")],
    data: Annotated[str, typer.Option(help="JSON Lines file, or a datasets dataset (Hub id or local).")],
    out: Annotated[Path, typer.Option(help="Folder for results.md, results.json and accuracy.png.")],
    codebook: Annotated[str | None, typer.Option(help="Folder or Hub id; none for a pruned checkpoint.")] = None,
    score: Annotated[list[str] | None, typer.Option(help="Scores to compare; default cosine. Repeat.")] = None,
    keep_ratio: Annotated[list[float] | None, typer.Option(help="Ratios, for every score. Repeat.")] = None,
    threshold: Annotated[list[float] | None, typer.Option(help="Cosine thresholds. Repeat.")] = None,
    tiles: Annotated[str, typer.Option(help="all or base.")] = "all",
    newlines: Annotated[str, typer.Option(help="all, row or last.")] = "all",
    seed: Annotated[int, typer.Option(min=0, help="Of score random.")] = 0,
    metric: Annotated[
        list[str] | None, typer.Option(help="exact, normalised, choice, yes_no; default normalised.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column with an image, or a list of them.")] = "image",
    question_column: Annotated[str, typer.Option()] = "question",
    answer_column: Annotated[str, typer.Option(help="An answer, or a list of accepted ones.")] = "answer",
    split: Annotated[str, typer.Option(help="Of a dataset.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Questions at most.")] = None,
    streaming: Annotated[bool, typer.Option(help="Read a Hub dataset without downloading it first.")] = False,
    suffix: Annotated[str, typer.Option(help="Added to every question.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
) -> None:
    """What pruning costs: accuracy against retention, for many rules on one pass over the images."""
    from ..evaluation.evaluate import evaluate as run
    from ..evaluation.evaluate import table_rows, write_results
    from ..evaluation.metrics import METRICS
    from ..evaluation.questions import read_questions

    _need_matplotlib()
    metrics = metric or ["normalised"]
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"--metric is one of {', '.join(METRICS)}, not {', '.join(unknown)}.")
    common = {"tiles": tiles, "newlines": newlines, "seed": seed}
    ratios = keep_ratio or ([] if threshold else [0.5, 0.33, 0.22, 0.15, 0.1, 0.05])
    rules = [PruningConfig(keep_ratio=r, score=s, **common) for s in score or ["cosine"] for r in ratios]
    rules += [PruningConfig(threshold=value, **common) for value in threshold or ()]
    loaded, processor = _load_pruned(model, codebook, dtype, device)
    for rule in rules:
        loaded.check_pruning(rule)  # a rule that needs a codebook ends here where there is none
    if streaming and limit is None:
        raise ValueError("A streamed dataset has no known length: give --limit.")
    questions = read_questions(data, image_column, question_column, answer_column, split, limit, streaming)
    shown = tqdm(questions, unit="question", total=limit)
    results, references = run(loaded, processor, shown, rules, metrics, max_new_tokens, suffix)
    about = {
        "model": model, "codebook": codebook or "the checkpoint's", "data": data, "questions": len(references),
        "device": f"{loaded.device}, {loaded.dtype}",
    }  # fmt: skip
    write_results(out, results, references, about)
    columns, rows = table_rows(results, references)
    table = Table(title=f"{model} on {data}, {len(references)} questions; \\[95% interval]")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    Console().print(table)
    Console().print(f"[bold]{out / 'results.md'}[/bold], results.json, accuracy.png")


@app.command()
@one_sentence
def calibrate(
    model: Annotated[str, typer.Option(help="Stock or pruned checkpoint: folder or Hub id.")],
    codebook: Annotated[str | None, typer.Option(help="Folder or Hub id; none for a pruned checkpoint.")] = None,
    images: Annotated[str | None, typer.Option(help="Unlabelled images: finds a threshold for --retention.")] = None,
    retention: Annotated[float, typer.Option(help="Mean share of visual tokens to keep.")] = 0.15,
    data: Annotated[
        str | None, typer.Option(help="Labelled questions: finds the lowest ratio that keeps --share.")
    ] = None,
    share: Annotated[float, typer.Option(help="Of the unpruned accuracy.")] = 0.97,
    keep_ratio: Annotated[list[float] | None, typer.Option(help="Ratios to try on --data. Repeat.")] = None,
    metric: Annotated[str, typer.Option(help="exact, normalised, choice or yes_no.")] = "normalised",
    image_column: Annotated[str, typer.Option()] = "image",
    question_column: Annotated[str, typer.Option()] = "question",
    answer_column: Annotated[str, typer.Option()] = "answer",
    split: Annotated[str, typer.Option(help="Of a dataset.")] = "train",
    limit: Annotated[int | None, typer.Option(min=2, help="Images or questions at most.")] = None,
    suffix: Annotated[str, typer.Option(help="Added to every question.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 16,
    write: Annotated[bool, typer.Option(help="Write the setting into the --codebook folder as recommended.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
) -> None:
    """Which setting to use: a threshold for a mean retention, or the lowest ratio that keeps an accuracy."""
    from ..evaluation.calibrate import image_scores, lowest_retention, threshold_for
    from ..evaluation.evaluate import evaluate as run
    from ..evaluation.metrics import METRICS
    from ..evaluation.questions import read_questions

    if (images is None) == (data is None):
        raise ValueError("Give --images (unlabelled) or --data (questions with answers).")
    if metric not in METRICS:
        raise ValueError(f"--metric is one of {', '.join(METRICS)}, not {metric}.")
    if not 0 < share <= 1:
        raise ValueError(f"--share is of the unpruned accuracy, in (0, 1]; got {share}.")
    if write and (codebook is None or not Path(codebook).is_dir()):
        raise ValueError("--write needs --codebook, a folder.")
    loaded, processor = _load_pruned(model, codebook, dtype, device)
    if loaded.codebook is None:
        raise ValueError(f"{model} has no codebook: give --codebook.")
    console = Console()
    if images is not None:
        source = ImageSource(images, image_column, split, limit=limit)
        opened = (i for _, _, i in source.items(list(range(len(source)))) if not isinstance(i, Exception))
        scores = image_scores(loaded, processor, tqdm(opened, total=len(source), unit="image"))
        found = threshold_for(scores, retention)
        setting = {"recommended_threshold": found.threshold}
        fitted, checked = found.images
        console.print(
            f"threshold [bold]{found.threshold:.4f}[/bold] keeps {found.fitted:.1%} of the tokens of {fitted} images "
            f"it was fitted on, and {found.checked:.1%} of {checked} others: overshoot {found.overshoot:+.1%}"
        )
    else:
        rules = [PruningConfig(keep_ratio=r) for r in keep_ratio or (0.5, 0.33, 0.22, 0.15, 0.1, 0.05)]
        questions = read_questions(data, image_column, question_column, answer_column, split, limit)
        shown = tqdm(questions, unit="question", total=limit)
        results, references = run(loaded, processor, shown, rules, [metric], max_new_tokens, suffix)
        found = lowest_retention(results, share, metric)
        if found is None:
            raise ValueError(f"None of these ratios keeps {share:.0%} of the unpruned accuracy: try higher ones.")
        best, low, high = found
        ratio = best.pruning["keep_ratio"]
        setting = {"recommended_keep_ratio": ratio}
        console.print(
            f"keep_ratio [bold]{ratio}[/bold] keeps {best.retention:.1%} of the tokens and {share:.0%} or more of the "
            f"unpruned accuracy (95% interval {low:.1%} to {high:.1%}, {len(references)} questions).\n"
            "It was chosen on these questions: confirm it on others."
        )
    if write:
        book = RedundancyCodebook.from_pretrained(codebook)
        book.recommended_keep_ratio = book.recommended_threshold = None
        for name, value in setting.items():
            setattr(book, name, value)
        book.save_pretrained(codebook)
        console.print(f"written into {codebook}")


@app.command()
@one_sentence
def publish(
    folder: Annotated[Path, typer.Argument(help="A folder laid out as its repository, e.g. one of codebooks/.")],
    repo: Annotated[str, typer.Argument(help="Hub id to publish it under; made if missing.")],
    dry_run: Annotated[bool, typer.Option(help="List what would go, and stop.")] = False,
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch.")] = None,
    create_pr: Annotated[bool, typer.Option(help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload a codebook, checkpoint or recipe to the Hub as it is. The token is that of `hf auth login` or HF_TOKEN."""
    from ..hub.publish import files_to_publish
    from ..hub.publish import publish as upload

    table = Table(title=f"{folder} as {repo}")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name, size in files_to_publish(folder):
        table.add_row(name, f"{size:,}")
    Console().print(table)
    if dry_run:
        Console().print("Nothing was uploaded.")
        return
    info = upload(folder, repo, private or None, None, revision, create_pr, message)
    Console().print(f"[bold]{info.pr_url or info.commit_url}[/bold]")


@app.command()
@one_sentence
def convert(
    source: Annotated[Path, typer.Argument(help="Upstream's .pt codebook.")],
    out: Annotated[Path, typer.Argument(help="Folder to write codebook.safetensors and codebook.json to.")],
    image_ids: Annotated[Path | None, typer.Option(help="JSON list: the image each prototype comes from.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model it belongs to.")] = None,
    keep_ratio: Annotated[float | None, typer.Option(help="Keep ratio to recommend, in (0, 1].")] = None,
    threshold: Annotated[float | None, typer.Option(help="Cosine threshold to recommend.")] = None,
    drop_duplicates: Annotated[bool, typer.Option(help="Leave repeated rows out: cosine scores stay.")] = False,
) -> None:
    """Turn an upstream .pt codebook into an artifact that from_pretrained reads."""
    from ..building.upstream import convert_upstream

    book = convert_upstream(source, image_ids, base_model, keep_ratio, threshold)
    repeated = book.built_with["source"]["repeated_rows"]
    if drop_duplicates:
        book = book.without_duplicates()
    book.save_pretrained(out)
    table = Table(title=str(out), show_header=False)
    table.add_row("source", f"{source.name}, sha256 {book.built_with['source']['sha256'][:12]}…")
    table.add_row("prototypes", " x ".join(map(str, book.prototypes.shape)))
    table.add_row("repeated rows", f"{repeated}, {'left out' if drop_duplicates else 'kept'}")
    table.add_row("base model", base_model or "not given")
    Console().print(table)


@app.command()
@one_sentence
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Stock or pruned checkpoint: folder or Hub id. Default: codebooks/digits-llava-next."),
    ] = None,
    codebook: Annotated[str | None, typer.Option(help="Folder or Hub id; none for a pruned checkpoint.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images to pick from; prototypes' source images are found in it by name."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; default this machine alone.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free one from 7860.")] = None,
    share: Annotated[bool, typer.Option(help="Ask gradio for a public address.")] = False,
    device: Annotated[str | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """A page: stock and pruned answers side by side, what was kept, and why a patch was dropped."""
    from ..demo import launch, load_demo

    if importlib.util.find_spec("gradio") is None:
        raise ValueError("The demo needs gradio: pip install transformers_rbl[demo].")
    _check_placement(dtype, device)
    launch(load_demo(model, codebook, images, device, dtype), host, port, share)


def _recipe(name: str | None, settings: list[str] | None, default: dict | None = None) -> Recipe:
    values = Recipe.load(name).to_dict() if name is not None else dict(default)
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {setting!r}.")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {setting!r} is no YAML: {' '.join(str(error).split())}") from error
    return Recipe.from_dict(values)


def _need_matplotlib() -> None:
    """Before hours of work, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("The report's pictures need matplotlib: pip install transformers_rbl[build].")


def _is_hub_id(name: str) -> bool:
    return not Path(name).exists() and not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _load_pruned(model: str, codebook: str | None, dtype: str, device: str | None):
    import torch
    from transformers import AutoProcessor

    from ..models.auto_rbl import rbl_class

    _check_placement(dtype, device)
    loaded = rbl_class(model).from_pretrained(model, codebook=codebook, pruning={"enabled": False}, dtype=dtype).eval()
    loaded = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return loaded, AutoProcessor.from_pretrained(model)


def _check_placement(dtype: str, device: str | None) -> None:
    import torch

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is auto, float32, bfloat16 or float16, not {dtype}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # no such name, or no such device here
        raise ValueError(f"--device {device}: {error}") from error


def _load(model: str, dtype: str, device: str, device_map: str | None):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _check_placement(dtype, device)
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, device_map=device_map).eval()
    if device_map is None:
        loaded = loaded.to(device)
    return loaded, AutoProcessor.from_pretrained(model)
