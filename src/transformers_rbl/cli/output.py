"""Where a command writes: tried before hours of work, and nothing that is there already is overwritten unasked."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path


def claim(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """A folder that these files can be written to.

    Args:
        folder (`Path`): made later, by whoever writes.
        names (`Sequence[str]`): what will be written, by its path in the folder.
        overwrite (`bool`): replace what is there.

    Raises:
        OSError: if nothing can be written there.
        ValueError: if one of the files is there and `overwrite` was not asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise OSError(f"{folder} is a file: give a folder to write to.")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise ValueError(
            f"{folder} holds {', '.join(there)} already: give another folder, or --overwrite to replace them."
        )
    _try(folder)


def claim_file(file: Path, overwrite: bool) -> None:
    """A file that can be written. Raises as [`claim`] does."""
    if file.is_dir():
        raise OSError(f"{file} is a folder: give a file to write to.")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} is there already: give another name, or --overwrite to replace it.")
    _try(file.parent)


def _try(folder: Path) -> None:
    """Write where the folder is or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        raise OSError(f"Nothing can be written to {folder}: {error.strerror or error}.") from error
