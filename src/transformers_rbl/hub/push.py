"""Upload a pruned model or a codebook, with its card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from ..models.codebook import RedundancyCodebook
from .cards import codebook_card, model_card


def push_model(
    model: Any,
    repo_id: str,
    *,
    processor: Any = None,
    with_code: bool = False,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    max_shard_size: int | str | None = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """See [`LoadingMixin.push_to_hub`]."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size, with_code=with_code)
        if processor is not None:
            processor.save_pretrained(folder)
        Path(folder, "README.md").unlink(missing_ok=True)  # of a folder; the repository's names the repository
        if not api.file_exists(repo_id, "README.md", revision=revision):
            model_card(model, repo_id, with_code=with_code, license=license, tags=tags).save(Path(folder, "README.md"))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload pruned model",
            commit_description=commit_description,
        )


def push_codebook(
    codebook: RedundancyCodebook,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload codebook",
    license: str | None = None,
) -> CommitInfo:
    """See [`RedundancyCodebook.push_to_hub`]."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        codebook.save_pretrained(folder)
        if not api.file_exists(repo_id, "README.md", revision=revision):
            codebook_card(codebook, repo_id, license).save(Path(folder, "README.md"))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )
