"""Questions about images: rows of a `datasets` dataset or of a JSON Lines file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from ..building.images import READ_ERRORS, open_dataset


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Question:
    """One example: its images (RGB), the question, and every answer that counts as right."""

    images: list[Image.Image]
    text: str
    answers: list[str]


def read_questions(
    source: str | os.PathLike[str],
    image: str = "image",
    question: str = "question",
    answer: str = "answer",
    split: str = "test",
    limit: int | None = None,
    streaming: bool = False,
) -> Iterator[Question]:
    """Examples, one at a time.

    Args:
        source (`str` or `os.PathLike`): a JSON Lines file (image paths relative to it), a folder that `save_to_disk`
            wrote, a folder of parquet files, or a dataset's Hub id.
        image (`str`): column or key with an image, or a list of them.
        question, answer (`str`): columns; `<image>` in a question says where its next image stands, without it they
            come first; an answer may be a list of accepted ones.
        split (`str`): of a dataset.
        limit (`int`, *optional*): at most so many.
        streaming (`bool`): read a Hub dataset without downloading it first.

    Raises:
        OSError: if there is no such source, or an image cannot be read.
        ValueError: if a column is missing or a row is no question; the message names the row.
    """
    for number, row in enumerate(_rows(source, split, streaming)):
        if limit is not None and number >= limit:
            return
        if absent := [name for name in (image, question, answer) if name not in row]:
            raise ValueError(f"{source} has no {', '.join(absent)} in row {number}; it has {', '.join(map(str, row))}.")
        cells = row[image] if isinstance(row[image], (list, tuple)) else [row[image]]
        accepted = row[answer] if isinstance(row[answer], (list, tuple)) else [row[answer]]
        if not cells or not accepted or row[question] is None:
            raise ValueError(f"Row {number} of {source} lacks an image, a question or an answer.")
        folder = Path(source).parent
        try:
            images = [_image(cell, folder) for cell in cells]
        except READ_ERRORS as error:
            raise OSError(f"An image of row {number} of {source} cannot be read: {error}") from error
        yield Question(images, str(row[question]), [str(item) for item in accepted])


def question_count(
    source: str | os.PathLike[str], split: str = "test", limit: int | None = None, streaming: bool = False
) -> int | None:
    """How many examples [`read_questions`] gives; None for a streamed dataset without a limit.

    Args:
        source, split, limit, streaming: as there.

    Raises:
        OSError, ValueError: as there.
    """
    if streaming:
        return limit
    path = Path(source)
    if path.is_file():
        count = sum(bool(line.strip()) for line in _lines(path))
    else:
        count = len(cast("Dataset", open_dataset(source, split)))
    return count if limit is None else min(count, limit)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no JSON Lines file.") from error


def _rows(source: str | os.PathLike[str], split: str, streaming: bool) -> Iterator[dict[str, Any]]:
    path = Path(source)
    if path.is_file():
        for number, line in enumerate(_lines(path)):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"Line {number + 1} of {path} is no JSON ({error}).") from error
                if not isinstance(row, dict):
                    raise ValueError(f"Line {number + 1} of {path} is no JSON object.")
                yield row
        return
    for row in open_dataset(source, split, streaming):
        yield dict(row)


def _image(cell: Any, folder: Path) -> Image.Image:
    if isinstance(cell, Image.Image):
        return cell.convert("RGB")
    if isinstance(cell, str):
        with Image.open(folder / cell) as image:
            return image.convert("RGB")
    raise ValueError(f"An image is a path or a datasets image, not {type(cell).__name__}.")
