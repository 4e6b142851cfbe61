"""Names of checkpoints and codebooks: a folder here or a repository of the Hub, and in words what is wrong with one."""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


FILES = {".pt", ".pth", ".bin", ".json", ".jsonl", ".safetensors", ".yaml", ".yml", ".csv", ".png", ".jpg", ".txt"}


def looks_local(name: str) -> bool:
    """Whether a name can only be meant as a path: `./book`, `a/b/c`, `book.pt`, `outputs/book` beside `outputs/`."""
    path = Path(name)
    return (
        path.exists()
        or name.startswith((".", "/", "~", "\\"))
        or name.endswith("/")
        or name.count("/") > 1
        or path.suffix.lower() in FILES
        or (path.parent != Path(".") and path.parent.is_dir())
    )


def check_folder(name: str | os.PathLike, what: str) -> None:
    """Refuse a path that is not there, before the Hub is asked for it: without a network that takes half a minute.

    Args:
        name (`str` or `os.PathLike`): a folder or a Hub id.
        what (`str`): what it is to be, for the message, e.g. `"a checkpoint"`.

    Raises:
        OSError: for a path where there is no folder.
    """
    text = os.fspath(name)
    if os.path.isdir(text) or not (isinstance(name, os.PathLike) or looks_local(text)):
        return
    if os.path.exists(text):
        raise OSError(f"{text} is a file, and {what} is a folder or a Hub id.")
    beside = Path(text).parent
    found = sorted(path.name for path in beside.iterdir() if path.is_dir())[:8] if beside.is_dir() else []
    hint = f" ({beside}/ holds {', '.join(found)})" if found else ""
    raise OSError(f"{text} is no folder with {what}, nor a Hub id{hint}.")


def check_checkpoint(name: str | os.PathLike) -> None:
    """Refuse a path where there is no checkpoint, before the Hub is asked for it or transformers reads the folder.

    Args:
        name (`str` or `os.PathLike`): a folder or a Hub id.

    Raises:
        OSError: for a path where there is no folder, or one without a model.
    """
    check_folder(name, "a checkpoint")
    folder = Path(name)
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    if (folder / "codebook.json").is_file():
        raise OSError(f"{folder} is a codebook, no model: give it as the codebook of one.")
    if (folder / "recipe.yaml").is_file():
        raise OSError(f"{folder} holds a codebook's recipe, no model: `rbl build --recipe {folder.name} …` uses it.")
    raise OSError(f"{folder} has no config.json: it holds no checkpoint.")


def why_no_codebook(path: str | os.PathLike) -> str:
    """One sentence on a file or folder that is taken for a codebook and is none."""
    folder = Path(path)
    if folder.is_file():
        if folder.suffix.lower() in (".pt", ".pth", ".bin"):
            return f"{folder} is a file of torch.save: `rbl convert {folder} FOLDER` makes a codebook's folder of it."
        if folder.name in ("codebook.json", "codebook.safetensors"):
            return f"{folder} is one file of a codebook: give its folder, {folder.parent}."
        return f"{folder} is a file, no folder with a codebook (codebook.json and codebook.safetensors)."
    missing = next(name for name in ("codebook.json", "codebook.safetensors") if not (folder / name).is_file())
    sentence = f"{folder / missing} is missing: a codebook folder holds codebook.json and codebook.safetensors."
    if (folder / "config.json").is_file():
        try:
            is_inside = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("num_prototypes")
        except (ValueError, AttributeError):
            return sentence
        if is_inside is not None:
            return f"{folder} is a model, and its codebook is inside it: load the model, without a codebook beside it."
        return f"{folder} is a model without a codebook: build one with `rbl build --model {folder} …`."
    if (folder / "recipe.yaml").is_file() and missing == "codebook.json":
        return (
            f"{folder} holds the recipe of a codebook, not the codebook: `rbl build --recipe {folder.name} …` makes it,"
            " and `rbl fetch --list` names those that their authors have released."
        )
    return sentence


def hub_words(error: Exception, name: str) -> str:
    """One sentence for an error of the Hub's client about repository `name`."""
    if isinstance(error, GatedRepoError):
        return f"{name} asks for its terms to be accepted (403): do that on its page, then `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no such branch, tag or commit (404): {_first_line(error)}"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{name} is neither a folder here nor a repository of the Hub that you may see (404): check the spelling, "
            "or `hf auth login` if it is private."
        )
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"The Hub refuses this for {name} ({status}): `hf auth login`, or a token that may, in HF_TOKEN."
        return f"The Hub answers {status} for {name}: try again later. {_first_line(error)}"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return (
            f"{name} is no folder here, not in the cache, and the Hub was not asked or did not answer: check the "
            "spelling or the connection, or give a folder."
        )
    return f"{name}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
