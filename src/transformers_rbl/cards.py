"""The card that a codebook's Hub repository opens with."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def codebook_card(codebook, repo_id: str = "path/to/this/codebook") -> ModelCard:
    """What the codebook is, what made it, and how to use it.

    Args:
        codebook ([`RedundancyCodebook`]): whatever it knows of itself is told; nothing is made up.
        repo_id (`str`): where the snippet loads it from.

    Returns:
        `huggingface_hub.ModelCard`, with YAML metadata.
    """
    base = codebook.base_model
    data = ModelCardData(
        base_model=base, library_name="transformers_rbl", tags=["visual-token-pruning", "redundancy-codebook", "llava"]
    )
    count, width = codebook.prototypes.shape
    rows = [("prototypes", f"{count} x {width}, float32"), ("base model", base or "not recorded")]
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
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    model = base or "path/to/the/model"
    argument = setting or "keep_ratio=0.2"
    text = f"""---
{data.to_yaml()}
---

# Redundancy codebook{f" for {base}" if base else ""}

Visual tokens that say nothing to {base or "a LLaVA model"}: tokens that look like one of these prototypes are dropped
before the language model sees them ([arXiv 2503.20540](https://arxiv.org/abs/2503.20540)).

| | |
| --- | --- |
{table}

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


def _setting(codebook) -> str | None:
    pruning = codebook.recommended_pruning
    if pruning is None:
        return None
    name = "keep_ratio" if pruning.keep_ratio is not None else "threshold"
    return f"{name}={getattr(pruning, name)}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
