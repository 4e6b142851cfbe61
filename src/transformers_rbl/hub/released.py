"""Codebooks that the paper's authors have released: where each file lies, and how it is fetched and checked."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from tqdm import tqdm

from ..models.codebook import RedundancyCodebook


REPOSITORY = "github.com/DingchenYang99/RedundancyCodebook"
COMMIT = "2a241729276e434895af09ec7498ffe90b2854c8"
MIRROR = "https://raw.githubusercontent.com/DingchenYang99/RedundancyCodebook"  # then /COMMIT/PATH
LICENSE = "apache-2.0"
MOST_BYTES = 64 * 2**20  # of one file: the largest has 8 MB
TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True)
class ReleasedFile:
    """A file of the repository, known by git's id of its content.

    Args:
        path (`str`): in the repository.
        blob (`str`): SHA-1 of `blob SIZE\\\\0` and the content, 40 hexadecimal digits.
    """

    path: str
    blob: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def address(self, mirror: str = MIRROR) -> str:
        return f"{mirror.rstrip('/')}/{COMMIT}/{self.path}"


@dataclass(frozen=True)
class Released:
    """A codebook of the authors.

    Args:
        base_model (`str`): Hub id of the model whose visual tokens its prototypes are.
        prototypes ([`ReleasedFile`]): of torch.save.
        image_ids ([`ReleasedFile`]): JSON list with the COCO image of each prototype.
        shape (`tuple[int, int]`): prototypes and their width.
    """

    base_model: str
    prototypes: ReleasedFile
    image_ids: ReleasedFile
    shape: tuple[int, int]


def _released(base_model: str, stem: str, blobs: tuple[str, str], shape: tuple[int, int]) -> Released:
    prototypes, image_ids = (ReleasedFile(f"codebooks/{stem}.{end}", blob) for end, blob in zip(("pt", "json"), blobs))
    return Released(base_model, prototypes, image_ids, shape)


RELEASED = {
    "llava-1.5-7b": _released(
        "llava-hf/llava-1.5-7b-hf",
        "241228-162634-llava15/coco_train_500samples_numPrototypes-454",
        ("43534d3253e9c3cc11ee375750cc07907d4695a8", "43d22e310f9a2c5368e6fc9c3beb10ff835243c3"),
        (454, 4096),
    ),
    "llama3-llava-next-8b": _released(
        "llava-hf/llama3-llava-next-8b-hf",
        "241202-122538-llavanext/coco_train_100samples_numPrototypes-969",
        ("3798fa1a38b22dcff0ff6fddaac8ecbb86158684", "11e9e9d3521efe98baf322a30c094197e2df8815"),
        (969, 4096),
    ),
    "llava-onevision-qwen2-7b-ov": _released(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "241225-101925-llavaov/coco_train_1200samples_numPrototypes-45",
        ("0e5bb04212bfe0fd38e10daa4d5886f808670a9e", "d54b43a4e98223b48cb9ad7602669c915ca465fb"),
        (45, 3584),
    ),
}


def released_codebook(name: str, mirror: str = MIRROR, offline: bool = False) -> RedundancyCodebook:
    """A codebook that its authors have released, downloaded once, checked, and converted.

    Args:
        name (`str`): a key of `RELEASED`.
        mirror (`str`): where the repository's files are served as `MIRROR/COMMIT/PATH`.
        offline (`bool`): take what was downloaded before, and ask no server.

    Returns:
        [`RedundancyCodebook`], whose `built_with["source"]` names repository, commit, file and images.

    Raises:
        OSError: if a file cannot be had; the message says what to download by hand.
        ValueError: for an unknown name, or a file that is not the released one.
    """
    from ..building.upstream import convert_upstream

    if name not in RELEASED:
        raise ValueError(f"No released codebook is called {name}; there are {', '.join(RELEASED)}.")
    codebook = RELEASED[name]
    try:
        files = [_fetch(file, mirror, offline) for file in (codebook.prototypes, codebook.image_ids)]
    except OSError as error:
        raise OSError(f"{error} {_by_hand(name, codebook, mirror)}") from error
    book = convert_upstream(files[0], files[1], codebook.base_model)
    book.built_with["source"] |= source_of(codebook)
    return book


def source_of(codebook: Released) -> dict[str, Any]:
    """What `built_with["source"]` says of where the prototypes come from."""
    file = codebook.prototypes
    return {"repository": REPOSITORY, "commit": COMMIT, "path": file.path, "git_blob": file.blob, "license": LICENSE}


def git_blob(content: bytes) -> str:
    """Git's id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _fetch(file: ReleasedFile, mirror: str, offline: bool) -> Path:
    """The file, from the cache beside the Hub's if it is there and sound, else from the server."""
    cached = Path(constants.HF_HOME, "transformers_rbl", "released", file.blob, file.name)
    if cached.is_file() and git_blob(cached.read_bytes()) == file.blob:
        return cached
    address = file.address(mirror)
    if offline or constants.HF_HUB_OFFLINE:
        raise OSError(f"{file.name} was not downloaded before, and offline no server is asked.")
    content = _download(address)
    if (found := git_blob(content)) != file.blob:
        raise ValueError(
            f"{address} is not the file that was released (git blob {found[:12]}…, {len(content)} bytes, and not "
            f"{file.blob[:12]}…): it was not kept. Try again, or without a mirror."
        )
    cached.parent.mkdir(parents=True, exist_ok=True)
    half = cached.with_name(f"{cached.name}.{os.getpid()}")
    half.write_bytes(content)
    half.replace(cached)
    return cached


def _download(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            total = int(answer.headers.get("Content-Length") or 0) or None
            content = bytearray()
            with tqdm(total=total, unit="B", unit_scale=True, desc=address.rpartition("/")[2]) as bar:
                while part := answer.read(2**16):
                    content += part
                    bar.update(len(part))
                    if len(content) > MOST_BYTES:
                        raise OSError(f"{address} sends more than {MOST_BYTES >> 20} MiB: no released file does.")
    except urllib.error.HTTPError as error:
        raise OSError(f"{address} answers {error.code} ({error.reason}).") from error
    except urllib.error.URLError as error:
        raise OSError(f"{address} cannot be reached ({error.reason}).") from error
    except ValueError as error:  # no address
        raise OSError(f"{address} is no address ({error}).") from error
    return bytes(content)


def _by_hand(name: str, codebook: Released, mirror: str) -> str:
    weights, ids = codebook.prototypes, codebook.image_ids
    return (
        f"By hand: download {weights.address(mirror)} and the {ids.name} beside it, then `rbl convert {weights.name} "
        f"./{name} --image-ids {ids.name} --base-model {codebook.base_model}`."
    )
