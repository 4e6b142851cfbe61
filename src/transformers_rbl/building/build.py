"""The build: probe every image (resumable, over any number of processes), then select, and write the codebook."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..hub.cards import save_with_card
from ..models.codebook import RedundancyCodebook
from ..models.llava_family import LlavaFamily, LlavaNextFamily
from .images import ImageSource
from .probing import Prober, article_tokens
from .processes import Processes
from .provenance import PROVENANCE_NAME, provenance_table
from .recipe import Recipe
from .records import Records, write_whole
from .report import write_report
from .selection import Probe, Selection, prototypes, select_prototypes
from .showing import family_of, show, tokenizer_of, why_not


@dataclass
class Probed:
    """What probing came to.

    Args:
        new, known (`int`): images probed now, and found in records of an earlier run.
        held_out (`int`): images kept from probing, whose tokens are in the records.
        skipped (`list[tuple[str, str]]`): images that could not be read, and why.
    """

    new: int = 0
    known: int = 0
    held_out: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)


def held_out(count: int, recipe: Recipe) -> set[int]:
    """Which of `count` images are kept from probing: evenly spread, at most a tenth."""
    wanted = min(recipe.held_out_images, count // 10)
    return {(k + 1) * count // (wanted + 1) for k in range(wanted)}


def describe_run(
    model: PreTrainedModel, processor: ProcessorMixin, model_name: str, recipe: Recipe, images: ImageSource
) -> dict[str, Any]:
    """What records are bound to: another recipe, model or image list must not share them."""
    crops = getattr(processor.image_processor, "do_center_crop", False)
    vision, family = model.config.vision_config, family_of(model)
    about: dict[str, Any] = {"name": model_name, "type": model.config.model_type}
    if isinstance(family, LlavaFamily):  # the others have a grid of their own for each image
        about["grid"] = vision.image_size // vision.patch_size
        # What part of a photo the base image shows: LLaVA-1.5's processor crops it, those with tiles squeeze it.
        crops = crops and not isinstance(family, LlavaNextFamily)
    about |= {
        "crop": "centre" if crops else "none",
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights_sha256": _weights_digest(model),
    }
    return {"recipe": recipe.to_dict(), "model": about, "images": images.describe()}


def probe_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    model_name: str,
    images: ImageSource,
    recipe: Recipe,
    folder: Path,
    max_tokens_per_batch: int = 8192,
    processes: Processes | None = None,
    progress: bool = True,
) -> Probed:
    """Probe this process's share of the images that have no sound record yet, and write their records.

    Args:
        model (`PreTrainedModel`): a stock model of a family in [`FAMILIES`], in eval mode.
        processor (`ProcessorMixin`): the checkpoint's.
        model_name (`str`): what the model is called in the records.
        images ([`ImageSource`]), recipe ([`Recipe`]): what to probe, and how.
        folder (`Path`): where records go, shared by all processes.
        max_tokens_per_batch (`int`): tokens computed in one forward pass.
        processes ([`Processes`], *optional*): default this one alone.
        progress (`bool`): show a progress bar.

    Raises:
        ValueError: if the folder holds records of another build, or the recipe does not fit the model.
        OSError: if a record cannot be written; those written stay.
    """
    if (reason := why_not(model, recipe)) is not None:
        raise ValueError(reason)
    processes = processes or Processes()
    records = Records(folder, describe_run(model, processor, model_name, recipe, images))
    if processes.index == 0:
        records.begin()
    processes.wait()
    tokenizer = tokenizer_of(processor)
    articles = article_tokens(tokenizer) if recipe.skip_articles else []
    prober = Prober(model, recipe, articles, max_tokens_per_batch)

    unprobed = held_out(len(images), recipe)
    mine = range(processes.index, len(images), processes.count)
    todo = [index for index in mine if records.read(index) is None]
    read = set(mine) - set(todo)
    result = Probed(known=len(read - unprobed), held_out=len(read & unprobed))
    skipped: list[tuple[int, str, str]] = []
    quiet = not progress or processes.index > 0
    with tqdm(total=len(mine), initial=len(read), unit="image", disable=quiet) as bar:
        for index, name, image in images.items(todo):
            if isinstance(image, Exception):
                skipped.append((index, name, f"{type(image).__name__}: {image}".splitlines()[0]))
            else:
                with torch.no_grad():
                    shown = show(model, processor, recipe.prompt, image)
                if index in unprobed:
                    records.write_held_out(index, name, shown.tokens)
                    result.held_out += 1
                else:
                    records.write(index, prober.probe(name, shown, _decoder(tokenizer)))
                    result.new += 1
            bar.update()
    shares = processes.gather([((result.new, result.known, result.held_out), skipped)])
    result.new, result.known, result.held_out = map(sum, zip(*(counts for counts, _ in shares)))
    result.skipped = [(name, why) for _, name, why in sorted(item for _, items in shares for item in items)]
    processes.wait()
    return result


def read_records(records: Records) -> tuple[list[Probe], list[tuple[str, torch.Tensor]]]:
    """Every probe, and every held-out image's name and tokens, in the order of images.

    Raises:
        ValueError: if there is no sound record of a probed image.
    """
    read = [records.read(index) for index in range(records.run["images"]["count"])]
    probes = [record for record in read if isinstance(record, Probe)]
    if not probes:
        raise ValueError(f"{records.folder} holds no sound record of a probed image.")
    return probes, [record for record in read if isinstance(record, tuple)]


def build_codebook(
    records: Records,
    recipe: Recipe,
    out: Path,
    base_model: str | None = None,
    keep_ratio: float | None = None,
    threshold: float | None = None,
    probed: Probed | None = None,
) -> tuple[RedundancyCodebook, Selection]:
    """Select prototypes from probe records, and write the artifact, its provenance table, recipe and report to `out`.

    Args:
        records ([`Records`]): of a finished (or interrupted) run.
        recipe ([`Recipe`]): whose selection settings count.
        out (`Path`): folder to write to.
        base_model (`str`, *optional*): Hub id of the model; None leaves it open.
        keep_ratio, threshold (`float`, *optional*): settings that the codebook recommends.
        probed ([`Probed`], *optional*): for the report.

    Raises:
        EmptyCodebookError: if no token meets every condition.
        OSError: if records are missing that the probing wrote, or a file cannot be written.
    """
    if probed is not None and len(probed.skipped) >= records.run["images"]["count"] > 0:
        name, reason = probed.skipped[0]
        raise ValueError(
            f"None of {len(probed.skipped)} images could be read (the first, {name}: {reason}): mend them, or give "
            "others, and run the same command again."
        )
    probes, unprobed = read_records(records)
    missing = records.run["images"]["count"] - len(probes) - len(unprobed)
    if probed is not None and missing > len(probed.skipped):
        raise OSError(
            f"{records.folder} lacks the records of {missing - len(probed.skipped)} images: all processes must write "
            "to one file system."
        )
    selection = select_prototypes(probes, recipe)
    name = records.run["model"]["name"]
    if Path(name).is_absolute() or Path(name).exists():
        name = Path(name).name  # a codebook is published: where its maker keeps a model is nobody's business
    model = {**records.run["model"], "name": name}
    book = RedundancyCodebook(
        prototypes(probes, selection),
        base_model=base_model,
        recommended_keep_ratio=keep_ratio,
        recommended_threshold=threshold,
        built_with={
            "recipe": json.loads(json.dumps(recipe.to_dict())),
            "model": model,
            "images": {**records.run["images"], "probed": len(probes), "held_out": len(unprobed)},
            "tokens": dict(selection.funnel),
            "words": dict(_commonest_words(probes, selection)),
        },
    )
    save_with_card(book, out)
    write_whole(out / PROVENANCE_NAME, provenance_table(probes, selection, recipe).encode())
    write_whole(out / "recipe.yaml", recipe.to_yaml().encode())
    write_report(out, book, probes, unprobed, selection, recipe, missing, probed.skipped if probed else [])
    return book, selection


def _commonest_words(probes: list[Probe], selection: Selection, count: int = 10) -> list[tuple[str, int]]:
    """What the model says most often when shown a prototype alone."""
    first = Counter(probes[i].words[r][0] for i, r in zip(selection.image, selection.row))
    return first.most_common(count)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], str]:
    """What a token id says."""
    return lambda token: str(tokenizer.decode([token])).strip()


def _weights_digest(model: PreTrainedModel) -> str:
    """Of a sample of every tensor: enough to tell checkpoints apart, and quick for large ones."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "codebook" in name:
            continue
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta":  # offloaded ones are not at hand
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, len(flat) // 64)][:64].cpu().contiguous()
            digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
