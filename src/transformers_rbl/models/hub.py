"""What a pruned model's Hub repository holds beside its weights: processor, card and, on request, code to load it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers.dynamic_module_utils import get_relative_import_files

from .cards import model_card


def auto_map(full: type) -> dict[str, str]:
    """Which class of the code files each Auto class loads, for a config's `auto_map`."""
    module = full.__module__.rpartition(".")[2]
    whole = f"{module}.{full.__name__}"
    return {
        "AutoConfig": f"configuration_rbl.{full.config_class.__name__}",
        "AutoModel": f"{module}.{full.headless.__name__}",
        "AutoModelForImageTextToText": whole,
        "AutoModelForMultimodalLM": whole,
    }


def copy_code(full: type, folder: Path) -> None:
    """Copy the files that load a pruned model, those that `full`'s own imports, into a checkpoint's folder."""
    module = sys.modules[full.__module__].__file__
    for file in (module, *get_relative_import_files(module)):
        shutil.copyfile(file, Path(folder, Path(file).name))


def push_model(
    model, repo_id: str, processor=None, with_code: bool = False, license: str | None = None, private=None, token=None,
    revision=None, create_pr: bool = False, commit_message: str | None = None, commit_description: str | None = None,
    max_shard_size="50GB", tags: list[str] | None = None,
):  # fmt: skip
    """See [`RBLMixin.push_to_hub`]."""
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size, with_code=with_code)
        if processor is not None:
            processor.save_pretrained(folder)
        if not api.file_exists(repo_id, "README.md", revision=revision):
            model_card(model, repo_id, with_code=with_code, license=license, tags=tags).save(Path(folder, "README.md"))
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
            commit_message=commit_message or "Upload pruned model", commit_description=commit_description,
        )  # fmt: skip


__all__ = ["push_model"]
