"""Probe records on disk: one file an image, written whole or not at all, checked on reading; a killed build goes on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .recipe import CHOICES, SELECTION, Recipe
from .selection import Probe


RUN_NAME = "run.json"


class Records:
    """A folder of probe records, and `run.json`: what they were made from.

    Args:
        folder (`str` or `os.PathLike`): made if missing.
        run (`dict`, *optional*): recipe, model and images of this build, JSON types only; None opens existing records.

    Raises:
        OSError: if there is nothing to open.
        ValueError: if the folder holds records of another recipe, model or image list; the message names the
            difference.
    """

    def __init__(self, folder: str | os.PathLike[str], run: dict[str, Any] | None = None):
        self.folder = Path(folder)
        saved = self._read_run()
        if run is not None:
            self.run = _as_json(run)
            if saved is not None and any(self.folder.glob("*.safetensors")):
                _check_same(saved, self.run, self.folder)
        elif saved is not None:
            self.run = saved
        else:
            raise OSError(f"{self.folder} holds no probe records ({RUN_NAME} is missing).")
        self.fingerprint = hashlib.sha256(json.dumps(self.run, sort_keys=True).encode()).hexdigest()

    def begin(self) -> None:
        """Write `run.json`; the process that starts a build does it once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / RUN_NAME, (json.dumps(self.run, indent=2) + "\n").encode())

    @property
    def one_grid(self) -> bool:
        """Whether all images have the grid that the run names; else each record says its own."""
        return "grid" in self.run.get("model", {})

    def path(self, index: int) -> Path:
        return self.folder / f"{index:08}.safetensors"

    def write(self, index: int, probe: Probe) -> None:
        """Keep what was measured of image number `index`."""
        tensors = {"positions": probe.positions, "tokens": probe.tokens, "p1": probe.p1}
        for kind in CHOICES["divergence"]:
            tensors[f"local.{kind}"], tensors[f"global.{kind}"] = probe.local[kind], probe.globally[kind]
        about: dict[str, Any] = {"image": probe.image, "words": probe.words}
        if probe.grid is not None and not self.one_grid:
            about["grid"] = list(probe.grid)
        self._write(index, tensors, about)

    def write_held_out(self, index: int, image: str, tokens: torch.Tensor) -> None:
        """Keep all tokens `(n, d)` of an image that is not probed."""
        self._write(index, {"tokens": tokens.cpu()}, {"image": image})

    def _write(self, index: int, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        about = {**about, "fingerprint": self.fingerprint, "digest": _digest(tensors)}
        write_whole(self.path(index), save(tensors, metadata={"record": json.dumps(about)}))

    def read(self, index: int) -> Probe | tuple[str, torch.Tensor] | None:
        """Image `index`: its probe, or name and tokens if it was held out, or None without a sound record."""
        try:
            content = self.path(index).read_bytes()
            tensors = load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about = json.loads(header["__metadata__"]["record"])
            if about["fingerprint"] != self.fingerprint or about["digest"] != _digest(tensors):
                return None
            if "positions" not in tensors:
                return about["image"], tensors["tokens"]
            return Probe(
                image=about["image"],
                positions=tensors["positions"],
                tokens=tensors["tokens"],
                p1=tensors["p1"],
                local={kind: tensors[f"local.{kind}"] for kind in CHOICES["divergence"]},
                globally={kind: tensors[f"global.{kind}"] for kind in CHOICES["divergence"]},
                words=about["words"],
                grid=tuple(about["grid"]) if "grid" in about else None,
            )
        except (FileNotFoundError, SafetensorError, KeyError, ValueError):
            return None  # cut short, damaged, or of another build: made anew

    def _read_run(self) -> dict[str, Any] | None:
        path = self.folder / RUN_NAME
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete its folder, or give another.") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there completely or not at all."""
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with half.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        if error.filename is None and error.errno is not None:  # a full disk names no file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """The value as it comes back from a file: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check_same(known: dict[str, Any], run: dict[str, Any], folder: Path) -> None:
    differences: list[str] = []
    selection_only = True
    for part in sorted(known.keys() | run.keys()):
        old, new = known.get(part), run.get(part)
        if not (isinstance(old, dict) and isinstance(new, dict)):
            old, new = {part: old}, {part: new}
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                name = key if key == part else f"{part} {key}"
                differences.append(f"{name} was {old.get(key)!r} and is {new.get(key)!r}")
                selection_only &= part == "recipe" and key in SELECTION
    if differences:
        advice = (
            "These settings select from records without probing again: use --from-records."
            if selection_only
            else "Give another output folder, or the settings of before."
        )
        raise ValueError(f"{folder} holds records of another build: {'; '.join(differences)}. {advice}")


def check_probed_as(records: Records, recipe: Recipe) -> None:
    """Whether a recipe can select from these records: it may differ from theirs in settings of the selection alone.

    Args:
        records ([`Records`]): of an earlier build.
        recipe ([`Recipe`]): to select with.

    Raises:
        ValueError: if a setting that probing depends on differs.
    """
    old, new = records.run["recipe"], _as_json(recipe.to_dict())
    changed = [name for name in old if name not in SELECTION and old[name] != new[name]]
    if changed:
        raise ValueError(
            f"The records were probed with another {', '.join(changed)}: only settings of the selection can be changed "
            "afterwards. Probe again for these."
        )


with_selection = check_probed_as  # its name in 0.1.0
