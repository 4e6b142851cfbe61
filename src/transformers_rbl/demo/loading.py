"""What the demo loads once: a pruned model, images and questions to pick from, and where its prototypes come from."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image, ImageOps
from transformers import AutoProcessor

from ..building.images import READ_ERRORS, SUFFIXES
from ..building.inspection import provenance_of
from ..building.recipe import shipped_folders
from ..models.auto_rbl import rbl_class


DEFAULT_MODEL = "digits-llava-next"
RATIO, THRESHOLD = "keep ratio", "threshold"
FIELDS = {RATIO: "keep_ratio", THRESHOLD: "threshold"}  # of PruningConfig
GUESSES = {RATIO: 0.2, THRESHOLD: 0.6}
QUESTION = "What is shown in this image?"
MOST_QUESTIONS = 6


@dataclass
class Demo:
    """What all requests share; nothing in it changes after loading.

    Args:
        model (`RBLGenerationMixin`): a full pruned model with a codebook, in eval mode.
        processor (`ProcessorMixin`): the checkpoint's.
        name (`str`): what the model is called.
        images (`list[Path]`): to pick from.
        questions (`list[str]`): to pick from.
        provenance (`list[dict[str, str]]`, *optional*): rows of the codebook's table.
        sources (`dict[str, Path]`): image files by the names that the table may give them.
        asked (`dict[Path, dict[str, str]]`): true answers by question, of images that have some.
        limits (`str`, *optional*): what the model cannot do, in the words of its card.
    """

    model: Any
    processor: Any
    name: str
    images: list[Path]
    questions: list[str]
    provenance: list[dict[str, str]] | None
    sources: dict[str, Path]
    asked: dict[Path, dict[str, str]] = field(default_factory=dict)
    limits: str | None = None

    def default(self, setting: str) -> float:
        """Where the slider of a setting begins: the model's own setting, the codebook's, or a guess."""
        name = FIELDS[setting]
        own, recommended = getattr(self.model.pruning, name, None), getattr(self.model.codebook, f"recommended_{name}")
        return next(value for value in (own, recommended, GUESSES[setting]) if value is not None)


def default_model() -> Path:
    """The repository's demonstration checkpoint.

    Raises:
        ValueError: if it is not there, as in an installed package.
    """
    for folder in shipped_folders():
        if folder.name == DEFAULT_MODEL and (folder / "config.json").is_file():
            return folder
    raise ValueError(
        f"codebooks/{DEFAULT_MODEL} lies in the repository only, not in an installed package: give --model, a "
        "checkpoint's folder or Hub id."
    )


def load_demo(
    model: str | os.PathLike | None = None,
    codebook: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    device: str | None = None,
    dtype: str = "auto",
) -> Demo:
    """Load everything once.

    Args:
        model (`str` or `os.PathLike`, *optional*): stock or pruned checkpoint, folder or Hub id; default
            [`default_model`].
        codebook (`str` or `os.PathLike`, *optional*): folder or Hub id; needed unless the checkpoint has one.
        images (`str` or `os.PathLike`, *optional*): folder of images to pick from, in which the prototypes' source
            images are looked for; a `questions.jsonl` in it gives questions to pick from, and their true answers.
            Default: `images` in the model's folder, else two photos that come with scikit-learn.
        device (`str`, *optional*): default a GPU if there is one.
        dtype (`str`): as in `from_pretrained`.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: if there is no model, no codebook or no image, or a provenance table is of another codebook.
    """
    model = str(default_model() if model is None else model)
    folder = Path(model, "images") if images is None and Path(model, "images").is_dir() else images
    files = sample_photos() if folder is None else image_files(folder)
    loaded = rbl_class(model).from_pretrained(model, codebook=codebook, dtype=dtype).eval()
    if loaded.codebook is None:
        raise ValueError(f"{model} has no codebook: give --codebook.")
    provenance = next(filter(None, map(provenance_of, provenance_places(model, codebook))), None)
    count = len(loaded.codebook.prototypes)
    if provenance is not None and len(provenance) != count:
        raise ValueError(f"The provenance table has {len(provenance)} rows, but the codebook {count} prototypes.")
    loaded = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = {} if folder is None else asked_of(folder, files)
    questions = dict.fromkeys(question for answers in asked.values() for question in answers)
    return Demo(
        model=loaded,
        processor=AutoProcessor.from_pretrained(model),
        name=Path(model).name,
        images=list(files.values()),
        questions=list(questions)[:MOST_QUESTIONS] or [QUESTION],
        provenance=provenance,
        sources={**{path.name: path for path in files.values()}, **files},
        asked=asked,
        limits=limits_of(model),
    )


def sample_photos() -> dict[str, Path]:
    """Two photos that come with scikit-learn: files by name."""
    from sklearn.datasets import load_sample_images

    return {Path(name).name: Path(name) for name in load_sample_images().filenames}


def image_files(folder: str | os.PathLike) -> dict[str, Path]:
    """Image files of a folder, searched in depth, by their path in it, sorted.

    Raises:
        ValueError: if it is no folder, or holds no images.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder of images.")
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))}).")
    return {str(path.relative_to(folder)): path for path in paths}


def asked_of(folder: str | os.PathLike, files: dict[str, Path]) -> dict[Path, dict[str, str]]:
    """Questions and true answers of a folder's images, by its `questions.jsonl`: the format of `rbl evaluate`.

    Args:
        folder (`str` or `os.PathLike`): of images.
        files (`dict[str, Path]`): its images by their path in it; rows of other images, or of several, are left out.

    Raises:
        ValueError: if the file is there, but does not hold questions.
    """
    file = Path(folder, "questions.jsonl")
    asked: dict[Path, dict[str, str]] = {}
    if not file.is_file():
        return asked
    try:
        for line in filter(str.strip, file.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            if isinstance(row["image"], str) and row["image"] in files:
                asked.setdefault(files[row["image"]], {})[str(row["question"])] = " or ".join(map(str, answers))
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not hold an image, a question and an answer in every line ({error!r})."
        ) from error
    return asked


def limits_of(model: str) -> str | None:
    """The first paragraph under `## Limits` (or Limitations) of a checkpoint's card: what the model cannot do.

    Args:
        model (`str`): folder or Hub id; of a Hub id only what was downloaded before is read.
    """
    card = Path(model, "README.md") if Path(model).is_dir() else try_to_load_from_cache(model, "README.md")
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return None
    text = Path(card).read_text(encoding="utf-8", errors="replace")
    paragraph = re.search(r"^#+ *limit(?:s|ations?)\b[^\n]*\n\s*([^#\s].*?)(?=\n\s*\n|\Z)", text, re.M | re.S | re.I)
    return " ".join(paragraph[1].split()) if paragraph else None


def open_photo(path: str | os.PathLike | None) -> Image.Image:
    """An uploaded file as an RGB image, upright.

    Args:
        path (`str` or `os.PathLike`, *optional*): None if nothing was uploaded.

    Raises:
        ValueError: if it is no image that can be read.
    """
    if path is None:
        raise ValueError("Pick or upload an image first.")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except READ_ERRORS as error:
        raise ValueError(f"{Path(path).name} is no image that can be read: upload another one.") from error


def provenance_places(model: str, codebook: str | os.PathLike | None) -> list[str | os.PathLike]:
    """Where a provenance table may be: beside the codebook given, or in the checkpoint, or in a folder of it."""
    if codebook is not None:
        return [codebook]
    return [model, Path(model, "codebook")] if Path(model).is_dir() else [model]
