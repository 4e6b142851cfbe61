"""Accuracy against what the vision tower spends on videos: all frames, or those alone that are new.

The testbed of digits, LLaVA-OneVision, in two kinds: videos as the testbed draws them, whose digit moves on every
frame; and some with still stretches: two to four of these frames, each held for a while, under a camera's noise.

    python scripts/benchmark_frames.py --out docs/results/frames-cpu.json
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoTokenizer

from benchmark_tiles import ROOT, answered, interval, report
from testbeds.digits.placing import BACKDROP
from testbeds.digits.questions import DigitExample, draw_example
from testbeds.digits.sizes import FRAMES, size_of
from transformers_rbl import PruningConfig, rbl_class


NOISE = 2.0  # standard deviation of a still frame's pixels, of 255 levels
SETTINGS = {
    "all": {"encode_once": False},
    "all, equal ones once": {},
    "where needed": {"frames": "where_needed"},
    "where needed, positions kept": {"frames": "where_needed", "keep_positions": True},
}
# The first three ask what is seen; the last one how long, which frames that are left out say nothing of.
ASKED = {"order, first, last": slice(0, 3), "in how many frames": slice(3, 4)}


def drawn(count: int, seed: int, held: bool) -> list[DigitExample]:
    """Test examples."""
    examples = []
    for number in range(count):
        random = np.random.default_rng([seed, number])
        example = draw_example(random, "video", "test", size_of("llava_onevision", (1, 1)), window=True)
        examples.append(hold(random, example) if held else example)
    return examples


def hold(random: np.random.Generator, example: DigitExample) -> DigitExample:
    """The example with some of its frames, each held, that show the same digits in the same order."""
    digits = [label[label < BACKDROP].max(initial=-1) for label in example.labels]
    wanted = {digit for digit in digits if digit >= 0}
    while True:
        scenes = np.sort(random.choice(FRAMES, int(random.integers(2, 5)), replace=False))
        ends = np.sort(random.choice(np.arange(1, FRAMES), len(scenes) - 1, replace=False))
        shown = np.repeat(scenes, np.diff([0, *ends, FRAMES]))
        if {digits[frame] for frame in shown if digits[frame] >= 0} == wanted:
            break
    noisy = [example.images[frame] + random.normal(0, NOISE, example.images[frame].shape) for frame in shown]
    answers = {"frames": str(sum(digits[frame] >= 0 for frame in shown))}
    return replace(
        example,
        images=[image.round().clip(0, 255).astype(np.uint8) for image in noisy],
        labels=[example.labels[frame] for frame in shown],
        questions=[(kind, question, answers.get(kind, said)) for kind, question, said in example.questions],
    )


def main(
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
    count: Annotated[int, typer.Option(help="Videos of each kind, four questions each.")] = 120,
    seed: int = 7,
    keep_ratio: Annotated[list[float] | None, typer.Option(help="Default .15.")] = None,
) -> None:
    """Accuracy against tower passes on the digits testbed."""
    torch.set_num_threads(1)
    checkpoint = ROOT / "codebooks" / "digits-llava-onevision"
    model = rbl_class(checkpoint).from_pretrained(checkpoint, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    figures = []
    for held in (False, True):
        examples = drawn(count, seed, held)
        for ratio in keep_ratio or (0.15,):
            base = None
            for name, settings in SETTINGS.items():
                rule = PruningConfig(keep_ratio=ratio, **settings)
                right, frames, kept = answered(model, tokenizer, examples, rule)
                base = (right, frames) if base is None else base
                for asked, columns in ASKED.items():
                    own, everything = right[:, columns].mean(1), base[0][:, columns].mean(1)
                    figures.append(
                        {
                            "videos": "still stretches" if held else "moving",
                            "keep_ratio": ratio,
                            "frames": name,
                            "asked": asked,
                            "accuracy": interval(own),
                            "accuracy_minus_all": interval(own - everything),
                            "tower_passes": interval(frames),
                            "tower_flops_share": float(frames.sum() / base[1].sum()),
                            "tokens": float(kept.mean()),
                        }
                    )
    report(figures, {"examples": count, "seed": seed}, out)


if __name__ == "__main__":
    typer.run(main)
