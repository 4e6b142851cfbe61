"""`rbl build`: a codebook from a model and images, or from the records of an earlier build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from .output import claim
from .shared import (
    Device,
    Dtype,
    ImageColumn,
    Overwrite,
    RecommendedRatio,
    RecommendedThreshold,
    Split,
    Streaming,
    app,
    check_setting,
    load_stock,
    need_matplotlib,
    one_sentence,
)


WRITTEN = ("codebook.json", "codebook.safetensors", "provenance.csv", "recipe.yaml", "report.md", "report")

if TYPE_CHECKING:
    from ..building.build import Probed
    from ..building.recipe import Recipe
    from ..building.selection import Selection
    from ..models.codebook import RedundancyCodebook


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
    image_column: ImageColumn = "image",
    split: Split = "train",
    streaming: Streaming = False,
    max_tokens_per_batch: Annotated[int, typer.Option(min=1, help="Tokens computed in one forward pass.")] = 8192,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: Annotated[str | None, typer.Option(help="Spread one model over devices: auto, balanced …")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id to record; default --model, if it is one.")] = None,
    keep_ratio: RecommendedRatio = None,
    threshold: RecommendedThreshold = None,
    overwrite: Overwrite = False,
) -> None:
    """Build a codebook: probe images with a model, cluster, select. A killed build goes on where it stopped.

    Over many processes: accelerate launch --num_processes N -m transformers_rbl.cli build …
    """
    from ..building.build import Processes, build_codebook, probe_images
    from ..building.images import ImageSource
    from ..building.records import RUN_NAME, Records, check_probed_as
    from ..hub.cards import card_is_ours
    from ..models.names import looks_local

    if (from_records is None) == (model is None):
        raise ValueError("Give --model and --images to probe, or --from-records to select again.")
    check_setting(keep_ratio, threshold)
    need_matplotlib()
    goes_on = (out / "records" / RUN_NAME).is_file()
    claim(out, WRITTEN, overwrite or goes_on)
    processes = Processes()
    try:
        if from_records is not None:
            if processes.count > 1:
                raise ValueError("Selecting again from records takes one process.")
            if images is not None:
                raise ValueError("--from-records needs no --images.")
            inner = from_records / "records"
            records = Records(inner if inner.is_dir() else from_records)
            chosen = recipe_with(recipe, setting, records.run["recipe"])
            check_probed_as(records, chosen)
            probed, name = None, records.run["model"]["name"]
        else:
            if model is None or images is None or recipe is None:
                raise ValueError("--model needs --images and --recipe besides.")
            chosen = recipe_with(recipe, setting)
            source = ImageSource(images, image_column, split, streaming, chosen.num_images)
            loaded, processor = load_stock(model, dtype, device or processes.device, device_map)
            folder = out / "records"
            probed = probe_images(loaded, processor, model, source, chosen, folder, max_tokens_per_batch, processes)
            if processes.index > 0:
                return
            records, name = Records(folder), model
        if base_model is None and not looks_local(name):
            base_model = name
        book, selection = build_codebook(records, chosen, out, base_model, keep_ratio, threshold, probed)
        Console().print(summary(out, book, selection, probed))
        if not card_is_ours(out):
            Console().print(f"{out / 'README.md'} was there, and stays as it was.")
    finally:
        processes.end()


def recipe_with(name: str | None, settings: list[str] | None, default: dict[str, Any] | None = None) -> Recipe:
    """The recipe that a build follows.

    Args:
        name (`str`, *optional*): YAML file or preset; None takes `default`.
        settings (`list[str]`, *optional*): NAME=VALUE, each in place of the recipe's.
        default (`dict`, *optional*): an earlier build's recipe.

    Raises:
        OSError: if there is no such file or preset.
        ValueError: for a setting that is no NAME=VALUE, unknown, or out of range.
    """
    from ..building.recipe import Recipe

    values = Recipe.load(name).to_dict() if name is not None else dict(default or {})
    for setting in settings or ():
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {setting!r}.")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {setting!r} is no YAML: {' '.join(str(error).split())}") from error
    return Recipe.from_dict(values)


def summary(out: Path, book: RedundancyCodebook, selection: Selection, probed: Probed | None) -> Table:
    """What a build came to, to print: images, tokens left after every condition, prototypes."""
    table = Table(title=str(out), show_header=False)
    if probed is not None:
        counts = f"{probed.new} probed, {probed.known} from records, {probed.held_out} held out, "
        table.add_row("images", f"{counts}{len(probed.skipped)} unreadable")
        for name, reason in probed.skipped[:5]:
            table.add_row("  unreadable", f"{name}: {reason}")
    for name, count in selection.funnel:
        table.add_row(name, str(count))
    table.add_row("prototypes", " x ".join(map(str, book.prototypes.shape)))
    table.add_row("within 1e-5 of a threshold", str(len(selection.borderline)))
    words = list(book.built_with["words"].items())[:5]
    table.add_row("shown alone, the model says", ", ".join(f"{word!r} {count}x" for word, count in words))
    table.add_row("report", str(out / "report.md"))
    return table
