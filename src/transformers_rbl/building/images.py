"""Where images come from: a folder, a list file, a `datasets` dataset."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image, UnidentifiedImageError

from ..models.names import looks_local


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes
READ_ERRORS = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


class ImageSource:
    """Numbered images, opened one at a time.

    Args:
        source (`str` or `os.PathLike`): a folder of image files (searched in depth, sorted by path), or one of them; a
            text file with one path a line, relative to it; a folder that `datasets.Dataset.save_to_disk` wrote, or one
            of parquet files; or a dataset's Hub id.
        column (`str`): of a dataset, the one with images.
        split (`str`): of a dataset from the Hub.
        streaming (`bool`): read a dataset from the Hub without downloading it first; `limit` must be given.
        limit (`int`, *optional*): take the first so many.

    Raises:
        OSError: if there is no such source.
        ValueError: if it has no images.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        column: str = "image",
        split: str = "train",
        streaming: bool = False,
        limit: int | None = None,
    ):
        self.name, self.column, self.streaming = str(source), column, streaming
        self.files: dict[str, Path] = {}
        self.dataset: Dataset | IterableDataset | None = None
        path = Path(source)
        if path.is_dir() and not _holds_dataset(path):
            images = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            self.files = {str(file.relative_to(path)): file for file in sorted(images)}
        elif path.is_file() and path.suffix.lower() in SUFFIXES:
            self.files = {path.name: path}
        elif path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is neither an image nor a list of paths.") from error
            self.files = {line.strip(): path.parent / line.strip() for line in lines if line.strip()}
        else:
            self.dataset = self._undecoded(open_dataset(source, split, streaming))
        self.files = dict(itertools.islice(self.files.items(), limit))
        self.length = len(self.files) if self.dataset is None else _length(self.dataset, limit)
        if self.length == 0:
            raise ValueError(f"{source} has no images ({', '.join(sorted(SUFFIXES))}).")

    def __len__(self) -> int:
        return self.length

    def items(self, indices: Sequence[int]) -> Iterator[tuple[int, str, Image.Image | Exception]]:
        """Number, name and RGB image of each of `indices` (ascending); an exception where it cannot be read."""
        if self.dataset is None:
            names = list(self.files)
            for index in indices:
                yield index, names[index], _opened(self.files[names[index]])
            return
        wanted, last = set(indices), max(indices, default=-1)
        for index, row in _rows(self.dataset, indices):
            if index > last:
                return
            if index in wanted:
                cell = row[self.column]
                file = os.path.basename((cell or {}).get("path") or "")
                yield index, f"row {index} {file}".rstrip(), _opened(cell)

    def describe(self) -> dict[str, str | int]:
        """What a build's records are bound to."""
        names = "\n".join(self.files) if self.dataset is None else getattr(self.dataset, "_fingerprint", "")
        return {
            "source": os.path.basename(self.name.rstrip(os.sep)) or self.name,
            "count": self.length,
            "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
        }

    def _undecoded(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """The dataset with its images as bytes, so that one unreadable image does not end the iteration."""
        from datasets import Image as ImageFeature

        columns = dataset.features or {}
        if self.column not in columns:
            raise ValueError(f"{self.name} has no column {self.column}; it has {', '.join(columns) or 'unknown ones'}.")
        return dataset.cast_column(self.column, ImageFeature(decode=False))


def open_dataset(source: str | os.PathLike[str], split: str, streaming: bool = False) -> Dataset | IterableDataset:
    """A dataset from a folder (of `save_to_disk`, or of files that `datasets` reads) or from the Hub.

    Raises:
        OSError: if there is none.
        ValueError: if it has no such split.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path, name = Path(source), str(source)
    if any((path / file).is_file() for file in SAVED):
        saved = load_from_disk(name)
        if not isinstance(saved, DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"{name} has the splits {', '.join(map(str, saved))}, not {split}.")
        return saved[split]
    if not path.is_dir() and looks_local(name):
        raise OSError(f"{name} is no file, folder or dataset.")
    try:
        # One split is one dataset, which the function's return type cannot say.
        return cast("Dataset | IterableDataset", load_dataset(name, split=split, streaming=streaming))
    except DatasetsError as error:
        raise OSError(f"{name} is no file, folder or dataset: {error}") from error


def _holds_dataset(path: Path) -> bool:
    return any((path / file).is_file() for file in SAVED) or any(path.glob("*.parquet"))


def _rows(dataset: Dataset | IterableDataset, indices: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with their numbers: at least those of `indices`; of a streamed dataset all, in turn."""
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        yield from enumerate(dataset)
    else:
        for index in indices:
            yield index, dataset[index]


def _length(dataset: Dataset | IterableDataset, limit: int | None) -> int:
    from datasets import IterableDataset

    if isinstance(dataset, IterableDataset):
        if limit is None:
            raise ValueError("A streamed dataset has no known length: say how many images to take (num_images).")
        return limit
    return len(dataset) if limit is None else min(limit, len(dataset))


def _opened(cell: Path | dict[str, Any] | None) -> Image.Image | Exception:
    """A file, or a dataset's undecoded cell, as an RGB image; the exception where it cannot be read."""
    try:
        source: Any = cell
        if isinstance(cell, dict):
            content = cell.get("bytes")
            source = io.BytesIO(content) if content is not None else cell["path"]
        with Image.open(source) as image:
            return image.convert("RGB")
    except (*READ_ERRORS, KeyError, TypeError, AttributeError) as error:
        return error
