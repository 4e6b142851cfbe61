"""The cards that Hub repositories of codebooks and of pruned models open with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..models.codebook import RedundancyCodebook
from ..models.loading import LoadingMixin
from ..models.pruning import PruningConfig


def model_card(
    model: LoadingMixin,
    repo_id: str = "path/to/this/model",
    with_code: bool = False,
    license: str | None = None,
    tags: list[str] | None = None,
) -> ModelCard:
    """What a pruned model is, how it is set, and how to use it.

    Args:
        model ([`RBLMixin`]): its config and codebook are told of; nothing is made up.
        repo_id (`str`): where the snippets load it from.
        with_code (`bool`): whether the repository holds the code that loads it.
        license (`str`, *optional*): of the weights.
        tags (`list[str]`, *optional*): beside the card's own.

    Returns:
        `huggingface_hub.ModelCard`, with YAML metadata.
    """
    base, pruning, codebook = model.config.base_model, model.pruning, model.base_model.codebook
    model_type = model.config.model_type
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=license,
        tags=["visual-token-pruning", "transformers_rbl", model.family.model_type.replace("_", "-"), *(tags or ())],
    )
    rows = [("base model", base or "not recorded")]
    if pruning is None or not pruning.enabled:
        rows.append(("pruning", "off: give `pruning=PruningConfig(…)` per call"))
    else:
        settings = {name: value for name, value in pruning.to_dict().items() if value is not None and name != "enabled"}
        rows += [(name, str(value)) for name, value in settings.items()]
        if pruning.keep_ratio is not None:
            rows.append(("retention", f"{pruning.keep_ratio:.0%} of an image's visual tokens, row ends aside"))
    if codebook is not None:
        rows += [(f"codebook: {name}", value) for name, value in _codebook_rows(codebook) if name != "base model"]
    code = f"""import transformers_rbl  # teaches transformers the model type: pip install transformers_rbl
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{repo_id}", dtype="auto")
processor = AutoProcessor.from_pretrained("{repo_id}")"""
    text = f"""---
{data.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

{f"[{base}](https://huggingface.co/{base})" if base else "A vision-language model"} whose language model
sees only the visual tokens that say something: {_rule_in_words(pruning)}.
Weights,{" codebook" if codebook is not None else ""} and settings are all here.

| | |
| --- | --- |
{_table(rows)}

```python
{code}
```
"""
    if with_code:
        text += f"""
Without `import transformers_rbl` and without the package, by the code in this repository:

```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)
```
"""
    else:
        text += f"""
Without `import transformers_rbl`, transformers says that it does not recognize the model type `{model_type}`. For
machines without the package, save or push the model with `with_code=True`, and load it there with
`trust_remote_code=True`.
"""
    return ModelCard(text)


def save_with_card(codebook: RedundancyCodebook, folder: Path) -> bool:
    """Write a codebook and its card to a folder; a README.md that somebody else wrote, or changed, stays.

    Args:
        codebook ([`RedundancyCodebook`]): to save.
        folder (`Path`): made if missing.

    Returns:
        `bool`: whether the card was written.

    Raises:
        OSError: if a file cannot be written.
    """
    is_ours = card_is_ours(folder)
    codebook.save_pretrained(folder)
    if is_ours:
        (folder / "README.md").write_text(codebook_card(codebook).content, encoding="utf-8")
    return is_ours


def card_is_ours(folder: Path) -> bool:
    """Whether a folder has no README.md, or exactly the card of the codebook in it."""
    readme = folder / "README.md"
    if not readme.exists():
        return True
    try:
        said = codebook_card(RedundancyCodebook.from_pretrained(folder)).content
        return readme.read_text(encoding="utf-8") == said
    except (OSError, ValueError):  # no codebook, or not one that this version reads: no card of ours either
        return False


def _rule_in_words(pruning: PruningConfig | None) -> str:
    """What leaves the prompt, by the rule of the settings."""
    if pruning is None or pruning.score == "cosine":
        return (
            "tokens that look like a prototype of its codebook leave the\nprompt ([arXiv 2503.20540](https://arxiv.org/"
            "abs/2503.20540))"
        )
    return f"those that the rule `{pruning.score}` calls redundant\nleave the prompt"


def codebook_card(
    codebook: RedundancyCodebook, repo_id: str = "path/to/this/codebook", license: str | None = None
) -> ModelCard:
    """What the codebook is, what made it, and how to use it.

    Args:
        codebook ([`RedundancyCodebook`]): whatever it knows of itself is told; nothing is made up.
        repo_id (`str`): where the snippet loads it from.
        license (`str`, *optional*): for the metadata; default that of the release which it was converted from.

    Returns:
        `huggingface_hub.ModelCard`, with YAML metadata.
    """
    base = codebook.base_model
    built = {name: value for name, value in codebook.built_with.items() if isinstance(value, dict)}
    data = ModelCardData(
        base_model=base,
        library_name="transformers_rbl",
        license=license or built.get("source", {}).get("license"),
        tags=["visual-token-pruning", "redundancy-codebook", "llava"],
    )
    model = base or "path/to/the/model"
    argument = _setting(codebook) or "keep_ratio=0.2"
    text = f"""---
{data.to_yaml()}
---

# Redundancy codebook{f" for {base}" if base else ""}

Visual tokens that say nothing to {base or "a vision-language model"}: tokens that look like one of these
prototypes are dropped before the language model sees them ([arXiv 2503.20540](https://arxiv.org/abs/2503.20540)).

| | |
| --- | --- |
{_table(_codebook_rows(codebook))}

```python
from transformers_rbl import rbl_class

model = rbl_class("{model}").from_pretrained("{model}", codebook="{repo_id}", {argument})
```
"""
    if "tokens" in built:
        text += "\n## How it was built\n\n| condition | tokens left |\n| --- | --- |\n"
        text += "".join(f"| {_cell(name)} | {left} |\n" for name, left in built["tokens"].items())
        text += (
            "\nThe recipe is in `codebook.json`, where each prototype comes from in `provenance.csv`, if it is there.\n"
        )
    return ModelCard(text)


def _codebook_rows(codebook: RedundancyCodebook) -> list[tuple[str, str]]:
    count, width = codebook.prototypes.shape
    rows = [("prototypes", f"{count} x {width}, float32"), ("base model", codebook.base_model or "not recorded")]
    setting = _setting(codebook)
    rows.append(("recommended setting", setting.replace("=", " ") if setting else "none: measure your own"))
    built = {name: value for name, value in codebook.built_with.items() if isinstance(value, dict)}
    images, source = built.get("images", {}), built.get("source", {})
    if {"probed", "source"} <= images.keys():
        rows.append(("built from", f"{images['probed']} images of {images['source']}"))
    if "words" in built:
        words = ", ".join(f"{word!r} ({times})" for word, times in list(built["words"].items())[:5])
        rows.append(("shown a prototype alone, the model says", words))
    if {"file", "sha256"} <= source.keys():
        rows.append(("converted from", f"{source['file']}, sha256 {source['sha256']}"))
    if {"repository", "commit", "license"} <= source.keys():
        rows.append(("released at", f"{source['repository']}, commit {source['commit']}, {source['license']}"))
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)


def _setting(codebook: RedundancyCodebook) -> str | None:
    pruning = codebook.recommended_pruning
    if pruning is None:
        return None
    name = "keep_ratio" if pruning.keep_ratio is not None else "threshold"
    return f"{name}={getattr(pruning, name)}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
