"""Accuracy of a testbed model under many pruning rules at equal retention, on one pass of the vision tower.

python scripts/testbeds compare-rules MODEL --kind image --codebook codebook=FOLDER --out results.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from transformers_rbl import RedundancyCodebook, rbl_class

from .answering import answer
from .encoding import Encoded, encode_all
from .registry import TESTBEDS, Kind, Split, TestbedName
from .rules import Choose, keep_all, keep_none, rules_of
from .tokens import family_of


BATCH = 50


@torch.no_grad()
def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    encoded: Sequence[Encoded],
    choose: Choose,
    renumber: bool = False,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Which answers are right, `(examples, questions)` bool, and each example's mask of the tokens kept. With
    `renumber`, kept tokens of an image with places are numbered as text is."""
    right, masks = [], []
    for start in range(0, len(encoded), BATCH):
        part = encoded[start : start + BATCH]
        kept = choose(part)
        masks += [each.mask for each in kept]
        features = [[image.renumbered() if renumber else image for image in each.images] for each in kept]
        right.append(answer(model, tokenizer, features, [item.example for item in part])[2])
    return torch.cat(right), masks


def as_bits(right: torch.Tensor) -> list[str]:
    """Per example, a digit for each question: 1 for a right answer."""
    return ["".join(str(int(bit)) for bit in row) for row in right]


def main(
    model: Annotated[Path, typer.Argument(help="A testbed checkpoint.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    kind: Kind = "image",
    codebook: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER; the first is the library's. Repeat.")] = None,
    split: Split = "validation",
    count: Annotated[int, typer.Option(help="Examples, of four questions each.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 100,
    unselected: Annotated[
        int, typer.Option(help="Without --codebook: tokens of the codebooks that no experiment chose.")
    ] = 100,
    threshold: Annotated[list[float] | None, typer.Option(help="Cosine thresholds of the first codebook.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rules to run, by name; default all.")] = None,
    testbed_name: TestbedName = "digits",
) -> None:
    """Compare pruning rules on a testbed model at equal retention."""
    torch.set_num_threads(1)
    if threshold and not codebook:
        raise typer.BadParameter("--threshold needs a --codebook.")
    testbed = TESTBEDS[testbed_name]
    loaded = rbl_class(model).from_pretrained(model, pruning={"enabled": False}, dtype="float32").eval()
    family = family_of(loaded.config)
    tokenizer = AutoTokenizer.from_pretrained(model)
    began = time.perf_counter()
    encoded = encode_all(loaded, list(testbed.examples(family, kind, split, count, seed)))
    train = encode_all(loaded, list(testbed.examples(family, kind, "train", 60, 1)))
    books = dict(entry.split("=", 1) for entry in codebook or ())
    books = {name: RedundancyCodebook.from_pretrained(folder) for name, folder in books.items()}
    rules = [("unpruned", 1.0, keep_all), ("no image", 0.0, keep_none)]
    rules += rules_of(books, encoded[0], threshold or [], train, testbed.subject, unselected)
    rules = [rule for rule in rules if not only or rule[0] in {*only, "unpruned"}]
    results = []
    for name, wanted, choose in tqdm(rules, unit="rule"):
        right, masks = accuracy(loaded, tokenizer, encoded, choose)
        kept = round(float(np.mean([item.share(mask) for item, mask in zip(encoded, masks)])), 4)
        results.append({"rule": name, "wanted": wanted, "kept": kept, "right": as_bits(right)})
    about = {
        "model": model.name,
        "family": family,
        "kind": kind,
        "split": split,
        "examples": count,
        "seed": seed,
        "questions": [name for name, _, _ in encoded[0].example.questions],
        "visual_tokens": round(float(np.mean([int((item.group >= 0).sum()) for item in encoded])), 1),
        f"{testbed.subject}_tokens": round(float(np.mean([item.touched for item in encoded])), 4),
        "prototypes": {name: len(book.prototypes) for name, book in books.items()},
        "seconds": round(time.perf_counter() - began),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, "results": results}) + "\n")
    base = np.mean([[int(bit) for bit in row] for row in results[0]["right"]])
    for result in results:
        mean = np.mean([[int(bit) for bit in row] for row in result["right"]])
        print(f"{result['rule']:32} {result['wanted']:6} kept {result['kept']:.3f} {mean:.3f} ({mean / base:.1%})")
