"""Where images come from: a folder, a list file, a `datasets` dataset."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError


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

    def __init__(self, source, column="image", split="train", streaming=False, limit: int | None = None):
        self.name, self.column, self.limit = str(source), column, limit
        self.paths = self.dataset = None
        path = Path(source)
        if path.is_dir() and not _holds_dataset(path):
            found = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            self.paths = {str(file.relative_to(path)): file for file in sorted(found)}
        elif path.is_file() and path.suffix.lower() in SUFFIXES:
            self.paths = {path.name: path}
        elif path.is_file():
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is neither an image nor a list of paths.") from error
            self.paths = {line.strip(): path.parent / line.strip() for line in lines if line.strip()}
        else:
            self.dataset = open_dataset(source, split, streaming)
        if self.dataset is not None:
            self._open_dataset(streaming)
        else:
            self.paths = dict(itertools.islice(self.paths.items(), limit))
        self.length = self._count()
        if self.length == 0:
            raise ValueError(f"{source} has no images ({', '.join(sorted(SUFFIXES))}).")

    def __len__(self) -> int:
        return self.length

    def items(self, indices: list[int]) -> Iterator[tuple[int, str, Image.Image | Exception]]:
        """Number, name and RGB image of each of `indices` (ascending); an exception where it cannot be read."""
        if self.paths is not None:
            names = list(self.paths)
            for index in indices:
                yield index, names[index], _opened(self.paths[names[index]])
            return
        wanted, last = set(indices), max(indices, default=-1)
        rows = enumerate(self.dataset) if self.streaming else ((i, self.dataset[i]) for i in indices)
        for index, row in rows:
            if index > last:
                return
            if index in wanted:
                cell = row[self.column]
                file = os.path.basename((cell or {}).get("path") or "")
                yield index, f"row {index} {file}".rstrip(), _opened(cell)

    def describe(self) -> dict[str, str | int]:
        """What a build's records are bound to."""
        names = "\n".join(self.paths) if self.paths is not None else getattr(self.dataset, "_fingerprint", "")
        return {
            "source": os.path.basename(self.name.rstrip(os.sep)) or self.name,
            "count": self.length,
            "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
        }

    def _open_dataset(self, streaming: bool) -> None:
        from datasets import Image as ImageFeature

        columns = self.dataset.features or {}
        if self.column not in columns:
            raise ValueError(f"{self.name} has no column {self.column}; it has {', '.join(columns) or 'unknown ones'}.")
        # Bytes, so that one unreadable image does not end the iteration.
        self.dataset = self.dataset.cast_column(self.column, ImageFeature(decode=False))
        self.streaming = streaming
        if streaming and self.limit is None:
            raise ValueError("A streamed dataset has no known length: say how many images to take (num_images).")

    def _count(self) -> int:
        if self.paths is not None:
            return len(self.paths)
        if self.streaming:
            return self.limit
        return len(self.dataset) if self.limit is None else min(self.limit, len(self.dataset))


def open_dataset(source, split: str, streaming: bool = False):
    """A dataset from a folder (of `save_to_disk`, or of files that `datasets` reads) or from the Hub.

    Raises:
        OSError: if there is none.
        ValueError: if it has no such split.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path, name = Path(source), str(source)
    if any((path / file).is_file() for file in SAVED):
        data = load_from_disk(name)
        if not hasattr(data, "keys"):
            return data
        if split not in data:
            raise ValueError(f"{name} has the splits {', '.join(data)}, not {split}.")
        return data[split]
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise OSError(f"{name} is no file, folder or dataset.")
    try:
        return load_dataset(name, split=split, streaming=streaming)
    except DatasetsError as error:
        raise OSError(f"{name} is no file, folder or dataset: {error}") from error


def _holds_dataset(path: Path) -> bool:
    return any((path / file).is_file() for file in SAVED) or any(path.glob("*.parquet"))


def _opened(source) -> Image.Image | Exception:
    try:
        if isinstance(source, dict):
            content = source.get("bytes")
            source = io.BytesIO(content) if content is not None else source["path"]
        with Image.open(source) as image:
            return image.convert("RGB")
    except (*READ_ERRORS, KeyError, TypeError, AttributeError) as error:
        return error
