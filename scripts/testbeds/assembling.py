"""Put a trained testbed model and its codebook together as one Hub repository: weights, codebook, settings, processor,
card, where each prototype comes from, and the images it was built from.

python scripts/testbeds assemble outputs/testbed-next/window outputs/book outputs/images codebooks/digits-llava-next
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoProcessor

from transformers_rbl import RedundancyCodebook, rbl_class
from transformers_rbl.building.build import PROVENANCE_NAME
from transformers_rbl.building.inspection import provenance_of
from transformers_rbl.hub.cards import model_card

from .answering import frame_of
from .registry import TESTBEDS, TestbedName
from .tokens import family_of


def main(
    trained: Annotated[Path, typer.Argument(help="A checkpoint of `train`.")],
    book: Annotated[Path, typer.Argument(help="What `rbl build` made for it.")],
    images: Annotated[Path, typer.Argument(help="The images that it was built from.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    keep_ratio: Annotated[float, typer.Option()] = 0.15,
    testbed_name: TestbedName = "digits",
) -> None:
    """Write a pruned testbed checkpoint as a Hub repository."""
    testbed, codebook = TESTBEDS[testbed_name], RedundancyCodebook.from_pretrained(book)
    codebook.recommended_keep_ratio, codebook.recommended_threshold = keep_ratio, None
    model = rbl_class(trained).from_pretrained(
        trained, codebook=codebook, keep_ratio=keep_ratio, check_base=False, dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    AutoProcessor.from_pretrained(trained).save_pretrained(out)
    shutil.copyfile(book / PROVENANCE_NAME, out / PROVENANCE_NAME)
    used = sorted({row["image"] for row in provenance_of(book)})
    (out / "images").mkdir(exist_ok=True)
    for name in used:
        shutil.copyfile(images / name, out / "images" / name)
    if (asked := images / "questions.jsonl").is_file():
        lines = [line for line in asked.read_text().splitlines() if json.loads(line)["image"] in used]
        (out / "images" / "questions.jsonl").write_text("\n".join(lines) + "\n")
    family = family_of(model.config)
    drawn = [next(testbed.examples(family, kind, "train", 1, 0)) for kind in testbed.kinds[family]]
    questions = "\n".join(
        f"- `{frame_of(family).prompt(example, question)}` → `{reply}`"
        for example in drawn
        for _, question, reply in example.questions
    )
    card = model_card(model, str(out), license="apache-2.0")  # its snippet loads the folder
    text = f"""
{testbed.card}

{questions}

## Limits

This model knows pictures and questions of its own testbed, and nothing else: what it says of a photo of yours means
nothing.

What pruning costs it, and how little that says of large models: {testbed.results}.
"""
    card.content = card.content.rstrip() + "\n" + text
    card.save(out / "README.md")
