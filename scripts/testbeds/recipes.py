"""What each step of building a codebook is worth: the recipe changed in one thing at a time, on validation examples.

python scripts/testbeds compare-recipes outputs/testbed-next/window --images outputs/images --out outputs/recipes
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from transformers_rbl import PruningConfig, RedundancyCodebook, rbl_class
from transformers_rbl.building.recipe import Recipe
from transformers_rbl.cli import app
from transformers_rbl.evaluation.metrics import paired_ratio_interval

from .comparison import accuracy
from .encoding import encode_all
from .registry import TESTBEDS, Kind, TestbedName
from .rules import Choose, keep_all, library_rule, oracle, scored_rule, unselected_codebooks
from .tokens import family_of


RETENTIONS = (0.22, 0.15, 0.1, 0.05)
# What is changed in the recipe. Those of the first kind probe anew, the others select from the base recipe's records.
PROBES = {
    "a left-out token becomes pad": {"replacement": "pad"},
    "a left-out token is removed": {"replacement": "remove"},
}
SELECTIONS = {
    "upstream's absolute thresholds": {"thresholds": "absolute", "max_p1": 0.15, "max_divergence": 2e-3},
    "by p1 alone": {"max_divergence": 1.0},
    "by divergence alone": {"max_p1": 1.0},
    "neither, nor the unique-image rule": {"max_p1": 1.0, "max_divergence": 1.0, "min_unique_images": 0},
    "Jensen-Shannon divergence": {"divergence": "jensen_shannon"},
    "with the cluster-size rule": {"max_cluster_size": 8},
    "without the cluster-size rule": {"max_cluster_size": None},
    "without the unique-image rule": {"min_unique_images": 0},
    "every token of a cluster": {"tokens_per_cluster": None},
}


def build(recipe: Recipe, changed: dict, folder: Path, *options: str) -> str | None:
    """`rbl build`; the error's text if no prototype was left."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump({**recipe.to_dict(), **changed}))
    command = ["build", "--recipe", str(path), "--out", str(folder), *options]
    result = CliRunner().invoke(app, command)
    return None if result.exit_code == 0 else " ".join(result.output.split())


def rule(book: RedundancyCodebook, ratio: float, score: str = "cosine") -> Choose:
    return library_rule(PruningConfig(keep_ratio=ratio, score=score), book)


def main(
    model: Annotated[Path, typer.Argument(help="A testbed checkpoint.")],
    images: Annotated[Path, typer.Option(help="Folder of images, of `scripts/testbeds images`.")],
    out: Annotated[Path, typer.Option(help="Folder for codebooks and results.json.")],
    recipe: Annotated[str, typer.Option(help="What is changed: a preset or a file.")] = "digits",
    count: Annotated[int, typer.Option(help="Validation examples, of four questions each.")] = 200,
    kind: Kind = "image",
    testbed_name: TestbedName = "digits",
) -> None:
    """Accuracy with codebooks that were built otherwise."""
    torch.set_num_threads(1)
    testbed = TESTBEDS[testbed_name]
    base = Recipe.load(recipe)
    books: dict[str, RedundancyCodebook | str] = {}
    folder = out / "as it is"
    probing = ["--model", str(model), "--dtype", "float32", "--images", str(images)]
    error = build(base, {}, folder, *probing)
    books["as it is"] = error or RedundancyCodebook.from_pretrained(folder)
    for name, changed in {**PROBES, **SELECTIONS}.items():
        if changed.items() <= base.to_dict().items():
            continue  # the recipe is so already
        source = probing if name in PROBES else ["--from-records", str(folder / "records")]
        error = build(base, changed, out / name, *source)
        books[name] = error or RedundancyCodebook.from_pretrained(out / name)

    loaded = rbl_class(model).from_pretrained(model, pruning={"enabled": False}, dtype="float32").eval()
    family, tokenizer = family_of(loaded.config), AutoTokenizer.from_pretrained(model)
    encoded = encode_all(loaded, list(testbed.examples(family, kind, "validation", count, 100)))
    train = encode_all(loaded, list(testbed.examples(family, kind, "train", 60, 1)))
    size = len(books["as it is"].prototypes)
    for seed in range(3):
        books[f"random tokens, draw {seed + 1}"] = unselected_codebooks(train, size, testbed.subject, seed)[
            "random tokens"
        ]

    def shares(make: Callable[[float], Choose]) -> list[tuple[float, float, float]]:
        cells = []
        for ratio in RETENTIONS:
            right = accuracy(loaded, tokenizer, encoded, make(ratio))[0].float().mean(1).numpy()
            cells.append((float(right.mean() / full.mean()), *map(float, paired_ratio_interval(right, full))))
        return cells

    with torch.no_grad():
        full = accuracy(loaded, tokenizer, encoded, keep_all)[0].float().mean(1).numpy()
        rows = []
        for name, book in books.items():
            if isinstance(book, str):
                rows.append((name, 0, book, None))
                continue
            rows.append((name, len(book.prototypes), "", shares(partial(rule, book))))
        double = partial(rule, books["as it is"], score="double_softmax")
        rows.append(("as it is, double softmax", size, "", shares(double)))
        rows.append(("oracle", 0, "", shares(lambda ratio: scored_rule(oracle, ratio))))
    print(f"Unpruned: {full.mean():.1%} of {len(encoded)} examples.\n")
    print("| codebook | prototypes | " + " | ".join(f"{ratio:.0%}" for ratio in RETENTIONS) + " |")
    print("| --- |" + " --- |" * (len(RETENTIONS) + 1))
    for name, prototypes, error, cells in rows:
        shown = [error] if cells is None else [f"{100 * m:.1f} [{100 * a:.1f}, {100 * b:.1f}]" for m, a, b in cells]
        print(f"| {name} | {prototypes or ''} | " + " | ".join(shown) + " |")
    content = {
        "model": model.name,
        "recipe": base.to_dict(),
        "examples": count,
        "unpruned": float(np.mean(full)),
        "rows": [{"name": n, "prototypes": p, "error": e, "shares": c} for n, p, e, c in rows],
    }
    (out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
