"""Which positions kept visual tokens get: those that they had in the whole prompt (of rows and columns in a model with
m-RoPE, else of places), or new ones, counted one after the other as if the image were text of that length.

python scripts/testbeds compare-positions MODEL --codebook FOLDER --out positions.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer

from transformers_rbl import PruningConfig, RedundancyCodebook, rbl_class
from transformers_rbl.evaluation.metrics import bootstrap_interval

from .comparison import accuracy, as_bits
from .encoding import encode_all
from .registry import TESTBEDS, Kind, Split, TestbedName
from .rules import keep_all, library_rule, oracle, scored_rule
from .tokens import family_of


RETENTIONS = (0.5, 0.33, 0.15, 0.05)


def main(
    model: Annotated[Path, typer.Argument(help="A testbed checkpoint.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    codebook: Annotated[Path | None, typer.Option(help="A folder; without one, tokens are kept by oracle.")] = None,
    kind: Kind = "image",
    split: Split = "validation",
    count: Annotated[int, typer.Option(help="Examples, of four questions each.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 100,
    testbed_name: TestbedName = "digits",
) -> None:
    """Compare own positions of kept tokens with renumbered ones."""
    torch.set_num_threads(1)
    testbed = TESTBEDS[testbed_name]
    loaded = rbl_class(model).from_pretrained(model, pruning={"enabled": False}, dtype="float32").eval()
    family, tokenizer = family_of(loaded.config), AutoTokenizer.from_pretrained(model)
    encoded = encode_all(loaded, list(testbed.examples(family, kind, split, count, seed)))
    for item in encoded:
        item.images = [image.numbered() for image in item.images]
    rules = [("unpruned", 1.0, keep_all)]
    for ratio in RETENTIONS:
        if codebook is not None:
            book = RedundancyCodebook.from_pretrained(codebook)
            rules.append(("codebook", ratio, library_rule(PruningConfig(keep_ratio=ratio), book)))
        rules.append(("oracle", ratio, scored_rule(oracle, ratio)))
    results = []
    print("| rule | kept | own positions | renumbered | own minus renumbered, in points |")
    print("| --- | --- | --- | --- | --- |")
    for name, ratio, choose in rules:
        own, masks = accuracy(loaded, tokenizer, encoded, choose)
        new, _ = accuracy(loaded, tokenizer, encoded, choose, renumber=True)
        kept = sum(item.share(mask) for item, mask in zip(encoded, masks)) / len(encoded)
        for positions, right in (("own", own), ("renumbered", new)):
            row = {"rule": name, "wanted": ratio, "positions": positions, "kept": round(kept, 4)}
            results.append({**row, "right": as_bits(right)})
        means = [100 * right.float().mean(1).numpy() for right in (own, new)]
        cells = [f"{values.mean():.1f}" for values in means]
        low, high = bootstrap_interval(means[0] - means[1])
        gap = (means[0] - means[1]).mean()
        print(f"| {name} | {kept:.0%} | {' | '.join(cells)} | {gap:+.1f} [{low:+.1f}, {high:+.1f}] |")
    about = {"model": model.name, "family": family, "kind": kind, "split": split, "examples": count, "seed": seed}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, "results": results}) + "\n")
