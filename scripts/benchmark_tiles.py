"""Accuracy against what the vision tower spends: all tiles, those that the thumbnail asks for, the thumbnail alone.

The testbed of digits, LLaVA-NeXT, in two kinds: images as the testbed draws them, full of decoys; and mostly empty
ones, where all but the window that holds the digits is blank, as much of a page or a screen is.

    python scripts/benchmark_tiles.py --out docs/results/tiles-cpu.json
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoTokenizer

from transformers_rbl import PruningConfig, RedundancyCodebook, rbl_class
from transformers_rbl.models.seam import MASKS


sys.path.insert(0, str(Path(__file__).parent))
from testbeds.answering import answer
from testbeds.digits.questions import DigitExample, draw_example
from testbeds.digits.sizes import PATCH, size_of
from testbeds.tokens import features_of, visuals_of


ROOT = Path(__file__).parents[1]
# Of tiles: those that the testbed's model was trained on, and one with more tiles than it has seen.
GRIDS = {"2x1, 3x1": ((2, 1), (3, 1)), "3x3": ((3, 3),)}
SETTINGS = {
    "all": {"tiles": "all", "encode_once": False},
    "all, equal ones once": {"tiles": "all"},
    "where needed": {"tiles": "where_needed"},
    "base": {"tiles": "base"},
}


def drawn(count: int, seed: int, grids: tuple[tuple[int, int], ...], empty: bool) -> list[DigitExample]:
    """Test examples whose digits lie in a window; with `empty` everything else is the image's mean colour."""
    examples = []
    for number in range(count):
        random = np.random.default_rng([seed, number])
        size = size_of("llava_next", grids[number * len(grids) // count])
        example = draw_example(random, "image", "test", size, window=True)
        if empty and example.window is not None:
            top, left, rows, columns = (length * PATCH for length in example.window)
            image = example.images[0]
            blank = np.broadcast_to(image.mean((0, 1)).round().astype(np.uint8), image.shape).copy()
            window = (slice(top, top + rows), slice(left, left + columns))
            blank[window] = image[window]
            example.images[0] = blank
        examples.append(example)
    return examples


@torch.no_grad()
def answered(model: Any, tokenizer: Any, examples: list[DigitExample], pruning: PruningConfig) -> tuple[Any, Any, Any]:
    """Per example: which questions it answers rightly, tiles or frames that passed the tower, tokens kept."""
    layer = next(module for name, module in model.model.vision_tower.named_modules() if name.endswith("layers.0"))
    rows: list[int] = []
    hook = layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    right, tiles, kept = [], [], []
    for example in tqdm(examples, leave=False, disable=None):  # one by one: equal tiles of two images would be shared
        rows.clear()
        inputs, outputs = features_of(model, [example], pruning=pruning)
        features = visuals_of(model, [example], inputs, outputs)
        if pruning.keep_positions:
            masks = outputs[MASKS["video" if example.video else "image"]]
            features = [[image.placed(mask) for image, mask in zip(features[0], masks)]]
        tiles.append(sum(rows))
        kept.append(sum(len(image) for image in features[0]))
        right.append(answer(model, tokenizer, features, [example])[2][0].float().numpy())
    hook.remove()
    return np.array(right), np.array(tiles), np.array(kept)


def interval(values: np.ndarray) -> list[float]:
    """Mean, and its 95% interval by bootstrap over examples."""
    draws = np.random.default_rng(0).choice(values, size=(2000, len(values))).mean(1)
    return [float(values.mean()), *map(float, np.quantile(draws, [0.025, 0.975]))]


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
    count: Annotated[int, typer.Option(help="Examples of each kind, four questions each.")] = 120,
    seed: int = 7,
    keep_ratio: Annotated[list[float] | None, typer.Option(help="Default .15.")] = None,
) -> None:
    """Accuracy against tower passes on the digits testbed."""
    torch.set_num_threads(1)
    checkpoint = ROOT / "codebooks" / "digits-llava-next"
    model = rbl_class(checkpoint).from_pretrained(checkpoint, dtype="float32").eval()
    assert isinstance(model.codebook, RedundancyCodebook)
    model.config.image_grid_pinpoints = [[*size_of("llava_next", grid)] for grids in GRIDS.values() for grid in grids]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    figures = []
    for grids, empty in itertools.product(GRIDS, (False, True)):
        examples = drawn(count, seed, GRIDS[grids], empty)
        for ratio in keep_ratio or (0.15,):
            base = None
            for name, settings in SETTINGS.items():
                rule = PruningConfig(keep_ratio=ratio, **settings)
                right, tiles, kept = answered(model, tokenizer, examples, rule)
                right = right.mean(1)
                base = (right, tiles) if base is None else base
                figures.append(
                    {
                        "grids": grids,
                        "images": "mostly empty" if empty else "full",
                        "keep_ratio": ratio,
                        "tiles": name,
                        "accuracy": interval(right),
                        "accuracy_minus_all": interval(right - base[0]),
                        "tower_passes": interval(tiles),
                        "tower_flops_share": float(tiles.sum() / base[1].sum()),
                        "tokens": float(kept.mean()),
                    }
                )
    report(figures, {"examples": count, "seed": seed}, out)


def report(figures: list[dict[str, Any]], about: dict[str, int], out: Path | None) -> None:
    """Print figures as a table, and write them with what they are of."""
    settings = list(figures[0])[: list(figures[0]).index("accuracy")]
    table = Table(*settings, "accuracy", "minus all", "tower passes", "tower FLOPs", "tokens")
    for row in figures:
        table.add_row(
            *(str(row[name]) for name in settings),
            "{:.3f} [{:.3f}, {:.3f}]".format(*row["accuracy"]),
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(*row["accuracy_minus_all"]),
            "{:.2f}".format(row["tower_passes"][0]),
            f"{row['tower_flops_share']:.2f}",
            f"{row['tokens']:.1f}",
        )
    Console(width=160).print(table)
    if out is not None:
        out.write_text(json.dumps({**about, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
