"""`rbl`, the command line: build, inspect, convert codebooks."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console
from rich.table import Table

from .building.images import ImageSource
from .building.recipe import Recipe
from .codebook import RedundancyCodebook
from .pruning import PruningConfig


app = typer.Typer(help="Codebooks of redundant visual tokens for LLaVA models.", no_args_is_help=True)


def one_sentence(command):
    """Bad input ends a command with one sentence and status 2, not with a traceback."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
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
    from .building.build import Processes, build_codebook, commonest_words, probe_images, read_records
    from .building.records import Records, with_selection

    if (from_records is None) == (model is None):
        raise ValueError("Give --model and --images to probe, or --from-records to select again.")
    for value in ({"keep_ratio": keep_ratio}, {"threshold": threshold}):
        if None not in value.values():
            PruningConfig(**value)
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
            probed = None
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
            if base_model is None and not Path(model).exists():
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
        words = commonest_words(read_records(records)[0], selection, 5)
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
    from .building.inspection import contact_sheet, describe_codebook, provenance_of

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
    from .building.upstream import convert_upstream

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


def _recipe(name: str | None, settings: list[str] | None, default: dict | None = None) -> Recipe:
    values = Recipe.load(name).to_dict() if name is not None else dict(default)
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {setting!r}.")
        values[key.strip()] = yaml.safe_load(value)
    return Recipe.from_dict(values)


def _load(model: str, dtype: str, device: str, device_map: str | None):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype is auto, float32, bfloat16 or float16, not {dtype}.")
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, device_map=device_map).eval()
    if device_map is None:
        loaded = loaded.to(device)
    return loaded, AutoProcessor.from_pretrained(model)


if __name__ == "__main__":
    app()
