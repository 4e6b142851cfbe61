"""Upstream's codebooks (`DingchenYang99/RedundancyCodebook`) as our artifact: the only place that reads a pickle."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ..models.codebook import RedundancyCodebook
from ..models.pruning import PruningConfig


def convert_upstream(
    path: str | os.PathLike[str],
    image_ids: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    recommended_keep_ratio: float | None = None,
    recommended_threshold: float | None = None,
) -> RedundancyCodebook:
    """Read a `.pt` codebook. Only tensors are unpickled (`weights_only=True`), onto the CPU.

    Args:
        path (`str` or `os.PathLike`): a tensor `(n, d)` of prototypes, floating point, as upstream saves it.
        image_ids (`str` or `os.PathLike`, *optional*): JSON list with the image that each prototype comes from.
        base_model (`str`, *optional*): Hub id of the model whose visual tokens they are.
        recommended_keep_ratio, recommended_threshold (`float`, *optional*): settings to recommend.

    Returns:
        [`RedundancyCodebook`], float32, repeated rows included. `built_with` tells the source: file name, sha256,
        dtype, how many rows repeat an earlier one, image ids.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if it holds anything but such a tensor, or as many image ids; the message names the file.
    """
    for name, setting in (("keep_ratio", recommended_keep_ratio), ("threshold", recommended_threshold)):
        if setting is not None:
            PruningConfig.from_dict({name: setting})  # out of range, it is not the file's fault
    file = Path(path)
    content = file.read_bytes()
    if content.lstrip()[:1] in (b"[", b"{"):
        raise ValueError(f"{file} is JSON: the codebook is the .pt beside it, and a list of image ids is --image-ids.")
    try:
        prototypes = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read as tensors alone: truncated, not a file of torch.save, or it holds objects, which "
            "are never unpickled here."
        ) from error
    source: dict[str, Any] = {"file": file.name, "sha256": hashlib.sha256(content).hexdigest()}
    if isinstance(prototypes, torch.Tensor):
        source["dtype"] = str(prototypes.dtype).removeprefix("torch.")
        if prototypes.ndim == 2 and len(prototypes) == 1:
            raise ValueError(
                f"{file} holds one row, as the pad token's embedding does: the codebook is the .pt whose rows are the "
                "prototypes."
            )
    if image_ids is not None:
        source["image_ids"] = _read_ids(Path(image_ids), len(prototypes))
    try:
        book = RedundancyCodebook(
            prototypes,
            base_model=base_model,
            recommended_keep_ratio=recommended_keep_ratio,
            recommended_threshold=recommended_threshold,
        )
    except ValueError as error:
        raise ValueError(f"{file} is no codebook: {error}") from error
    source["repeated_rows"] = len(book.prototypes) - len(book.without_duplicates().prototypes)
    book.built_with = {"source": source}
    return book


def _read_ids(path: Path, count: int) -> list[Any]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}).") from error
    if not isinstance(ids, list) or len(ids) != count:
        content = f"{len(ids)} entries" if isinstance(ids, list) else type(ids).__name__
        raise ValueError(f"{path} must be a list with one image id for each of {count} prototypes; it has {content}.")
    return ids
