"""Names of checkpoints and codebooks: a folder here or a repository of the Hub, and in words what is wrong with one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  of whichever httpx it uses: connections fail with it
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


FILES = {".pt", ".pth", ".bin", ".json", ".jsonl", ".safetensors", ".yaml", ".yml", ".csv", ".png", ".jpg", ".txt"}
UNREACHABLE = ("ConnectError", "ConnectTimeout", "ProxyError")  # httpx's names of what keeps the Hub from being asked


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


def check_folder(
    name: str | os.PathLike, what: str, cache_dir: str | os.PathLike | None = None, local_files_only: bool = False
) -> None:
    """Refuse a path that is not there, and a Hub id that can be had neither from the cache nor from the Hub, before the
    Hub's client tries for half a minute.

    Args:
        name (`str` or `os.PathLike`): a folder or a Hub id.
        what (`str`): what it is to be, for the message, e.g. `"a checkpoint"`.
        cache_dir (`str` or `os.PathLike`, *optional*): where downloads lie; default the Hub client's.
        local_files_only (`bool`, defaults to `False`): the Hub is not to be asked.

    Raises:
        OSError: for a path where there is no folder, and for a Hub id that nobody can be asked about.
    """
    text = os.fspath(name)
    if os.path.isdir(text):
        return
    if not (isinstance(name, os.PathLike) or looks_local(text)):
        if not local_files_only and not in_cache(text, cache_dir) and (reason := why_no_hub(text)) is not None:
            raise OSError(
                f"{text} is no folder here, not in the cache, and {constants.ENDPOINT} cannot be reached ({reason}): "
                "check the spelling or the connection, or give a folder."
            )
        return
    if os.path.exists(text):
        raise OSError(f"{text} is a file, and {what} is a folder or a Hub id.")
    beside = Path(text).parent
    found = sorted(path.name for path in beside.iterdir() if path.is_dir())[:8] if beside.is_dir() else []
    hint = f" ({beside}/ holds {', '.join(found)})" if found else ""
    raise OSError(f"{text} is no folder with {what}, nor a Hub id{hint}.")


def in_cache(name: str, cache_dir: str | os.PathLike | None = None) -> bool:
    """Whether anything of a repository was downloaded before: then the Hub's client answers from that by itself."""
    folder = Path(cache_dir or constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    return folder.is_dir() and any(folder.iterdir())


def why_no_hub(name: str) -> str | None:
    """Why the Hub cannot be asked about repository `name`; None if it answers, whatever the answer.

    The Hub's client tries to connect six times, in 23 seconds; this asks once, and again a second later. An answer that
    is slow or an error is left to the client, which tries again on its own terms.
    """
    for pause in (1, 0):
        try:
            # Without a token: a refusal is an answer too.
            get_hf_file_metadata(hf_hub_url(name, "config.json"), token=False, timeout=5)
            return None
        except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled):
            return None
        except HTTPError as error:
            if type(error).__name__ not in UNREACHABLE:
                return None
            reason = _first_line(error)
            time.sleep(pause)
    return reason


def check_checkpoint(
    name: str | os.PathLike, cache_dir: str | os.PathLike | None = None, local_files_only: bool = False
) -> None:
    """Refuse what [`check_folder`] does, and a folder without a model, before transformers reads it.

    Args:
        name, cache_dir, local_files_only: as in [`check_folder`].

    Raises:
        OSError: for a path where there is no folder, a folder without a model, and a Hub id that nobody can be asked
            about.
    """
    check_folder(name, "a checkpoint", cache_dir, local_files_only)
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
