"""Three drawings of every thing, from npm packages that are fetched once, checked, and kept in the user's cache.

| style | package | licence of the drawings |
| --- | --- | --- |
| fluent | @lobehub/fluent-emoji-3d 1.1.0 | MIT (Microsoft's Fluent Emoji; package: MIT) |
| noto | emoji-datasource-google 16.0.0 | Apache-2.0 (Google's Noto Emoji; package: MIT) |
| twemoji | emoji-datasource-twitter 16.0.0 | CC-BY-4.0 (Twemoji, by Twitter and contributors; package: MIT) |
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HOME
from PIL import Image

from .concepts import CODES, CONCEPTS, STYLES


SIDE = 64  # pixels of a drawing's longer side in the cache
PACKAGES = {  # style: address, sha512 as npm writes it, path of a drawing in it
    "fluent": (
        "https://registry.npmjs.org/@lobehub/fluent-emoji-3d/-/fluent-emoji-3d-1.1.0.tgz",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "package/assets/{code}.webp",
    ),
    "noto": (
        "https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "package/img/google/64/{code}.png",
    ),
    "twemoji": (
        "https://registry.npmjs.org/emoji-datasource-twitter/-/emoji-datasource-twitter-16.0.0.tgz",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "package/img/twitter/64/{code}.png",
    ),
}


def cache_folder() -> Path:
    """Where drawings and assembled checkpoints are kept: beside the Hub's cache, so HF_HOME and XDG_CACHE_HOME move
    it."""
    return Path(HF_HOME) / "rbl-testbeds" / "scenes"


@functools.cache
def drawings() -> dict[tuple[str, str], np.ndarray]:
    """`(height, width, 4)` uint8 of every (concept, style), cropped to what is drawn; fetched on first use.

    Raises:
        RuntimeError: if a package cannot be fetched, or is not the one expected.
    """
    path = cache_folder() / f"drawings-{hashlib.sha256(repr((PACKAGES, CODES, SIDE)).encode()).hexdigest()[:12]}.npz"
    if not path.is_file():
        found = {f"{name} {style}": image for style in STYLES for name, image in unpack(style).items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f"{os.getpid()}-{path.name}")
        np.savez_compressed(half, **found)
        half.replace(path)
    with np.load(path) as found:
        return {tuple(key.split()): found[key] for key in found.files}


def unpack(style: str) -> dict[str, np.ndarray]:
    """The drawings of one package, fetched."""
    address, digest, member = PACKAGES[style]
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            content = answer.read()
    except (urllib.error.URLError, TimeoutError) as error:
        raise RuntimeError(f"The drawings of the scenes testbed cannot be fetched from {address}: {error}.") from error
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != digest:
        raise RuntimeError(f"{address} is not the file that the scenes testbed was made with: its sha512 differs.")
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        codes = {member.format(code=code): name for name, code in CODES.items()}
        for entry in archive:
            if entry.name in codes:
                found[codes[entry.name]] = cropped(Image.open(archive.extractfile(entry)).convert("RGBA"))
    assert set(found) == set(CONCEPTS), sorted(set(CONCEPTS) - set(found))
    return found


def cropped(image: Image.Image) -> np.ndarray:
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 40)).getbbox())
    scale = SIDE / max(image.size)
    size = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


@functools.lru_cache(maxsize=20_000)
def drawn(name: str, style: str, side: int, angle: int, mirrored: bool) -> np.ndarray:
    """`(height, width, 4)` uint8 of a drawing, turned by `angle` degrees, its longer side of `side` pixels."""
    image = Image.fromarray(drawings()[name, style])
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 40)).getbbox())
    scale = side / max(image.size)
    size = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2))
