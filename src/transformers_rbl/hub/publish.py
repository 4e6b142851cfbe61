"""A folder of `codebooks/` becomes a Hub repository, as it is."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

from ..building.recipe import Recipe
from ..models.codebook import CARD_NAME, RedundancyCodebook


# Left out: what a build keeps to go on with, caches, hidden files.
IGNORED = ["records/*", "__pycache__/*", "*/__pycache__/*", ".*", "*/.*"]
PICKLES = {".pt", ".pth", ".bin", ".pkl", ".ckpt"}


def files_to_publish(folder: str | os.PathLike) -> list[tuple[str, int]]:
    """Path and bytes of every file that [`publish`] uploads, after checking that it makes a repository.

    Args:
        folder (`str` or `os.PathLike`): a codebook, a checkpoint, or a recipe with its card.

    Raises:
        OSError: if there is no such folder.
        ValueError: if it lacks a card or content, holds a pickle, or holds a codebook, weights or recipe that cannot be
            read; the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"{folder} is no folder.")
    every = (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())
    found = list(filter_repo_objects(every, ignore_patterns=IGNORED))
    if "README.md" not in found:
        raise ValueError(f"{folder} has no README.md: a Hub repository opens with its card.")
    if pickles := [name for name in found if Path(name).suffix in PICKLES]:
        raise ValueError(f"{folder} holds {', '.join(pickles)}: pickles are not published, safetensors are.")
    if not {CARD_NAME, "config.json", "recipe.yaml"} & set(found):
        raise ValueError(f"{folder} holds no codebook, no checkpoint and no recipe.")
    if CARD_NAME in found:
        RedundancyCodebook.from_pretrained(folder)
    if "recipe.yaml" in found:
        Recipe.load(folder / "recipe.yaml")
    for name in found:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, "pt"):
                    pass
            except SafetensorError as error:
                raise ValueError(f"{folder / name} is truncated or no safetensors file ({error}).") from error
    return [(name, (folder / name).stat().st_size) for name in found]


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
):
    """Upload a folder to a model repository, made if missing. Raises as [`files_to_publish`] does, before anything is
    uploaded.

    Args:
        folder, repo_id: from where, and where to, e.g. `"org/rbl-codebook-llava-next-8b"`.
        private, token, revision, create_pr, commit_message: as in `HfApi.create_repo` and `HfApi.upload_folder`.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    names = [name for name, _ in files_to_publish(folder)]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        allow_patterns=names,
        ignore_patterns=IGNORED,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or f"Upload {Path(folder).resolve().name}",
    )
