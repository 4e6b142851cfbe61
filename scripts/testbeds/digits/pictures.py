"""Pictures of what the committed testbed checkpoints keep, and why they drop the rest, of held-out images.

python scripts/testbeds pictures docs/results/testbed

Writes kept.png (tiles at several retentions), sizes.png (images of several sizes), frames.png (a video) and why.png
(dropped patches beside the source patches of their prototypes, with what the model says of those).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image
from transformers import AutoProcessor, BatchFeature, PreTrainedModel, ProcessorMixin

from transformers_rbl import PruningConfig, rbl_class
from transformers_rbl.building.inspection import provenance_of
from transformers_rbl.evaluation.evaluate import prompt_text
from transformers_rbl.evaluation.explain import explain, plot_explanations
from transformers_rbl.evaluation.plots import plot_frames, plot_retentions

from .questions import examples


CHECKPOINTS = Path(__file__).resolve().parents[3] / "codebooks"
QUESTION = "which digits are there?"
SEED = 5  # of the examples; none of the tables has it
SIZES = ((6, 9), (8, 7))  # rows and columns of Qwen3-VL's visual tokens


def load(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    model = rbl_class(CHECKPOINTS / name).from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(CHECKPOINTS / name)


def build_inputs(processor: ProcessorMixin, image: Image.Image) -> BatchFeature:
    return processor(images=image, text=prompt_text(processor, QUESTION, 1), return_tensors="pt")


@torch.no_grad()
def picture_tiles(path: Path) -> None:
    model, processor = load("digits-llava-next")
    images = [each.pictures()[0] for each in examples("llava_next", "image", "test", 2, SEED, (2, 1))]
    prepared = [build_inputs(processor, image) for image in images]
    kinds = [model.model.token_kinds(**inputs)[0] for inputs in prepared]
    ratios = (0.33, 0.15, 0.05)
    masks = [
        [model(**inputs, pruning=PruningConfig(keep_ratio=r)).keep_masks[0] for inputs in prepared] for r in ratios
    ]
    plot_retentions(images, masks, kinds, [f"{ratio:.0%}" for ratio in ratios], path)


@torch.no_grad()
def picture_sizes(path: Path) -> None:
    model, processor = load("digits-qwen3-vl")
    drawn = [next(examples("qwen3_vl", "image", "test", 1, SEED + row, grid)) for row, grid in enumerate(SIZES)]
    images = [example.pictures()[0] for example in drawn]
    prepared = [build_inputs(processor, image) for image in images]
    layouts = [model.model.layouts(**inputs)[0] for inputs in prepared]
    ratios = (0.33, 0.15, 0.05)
    masks = [
        [model(**inputs, pruning=PruningConfig(keep_ratio=r)).keep_masks[0] for inputs in prepared] for r in ratios
    ]
    plot_retentions(images, masks, layouts, [f"{ratio:.0%}" for ratio in ratios], path)


@torch.no_grad()
def picture_frames(path: Path) -> None:
    model, processor = load("digits-llava-onevision")
    frames = next(examples("llava_onevision", "video", "test", 1, SEED)).pictures()
    inputs = processor(videos=[frames], text=["<video> which digits are there in order?"], return_tensors="pt")
    ratios = (0.5, 0.25, 0.125)
    masks = [model(**inputs, pruning=PruningConfig(keep_ratio=ratio)).video_keep_masks[0] for ratio in ratios]
    plot_frames(frames, masks, [f"{ratio:.1%}" for ratio in ratios], path)


@torch.no_grad()
def picture_reasons(path: Path) -> None:
    name = "digits-llava-1.5"  # no tiles: every token is one patch of the image
    model, processor = load(name)
    image = next(examples("llava", "image", "test", 1, SEED)).pictures()[0]
    inputs = build_inputs(processor, image)
    tokens = model.get_image_features(
        pixel_values=inputs.pixel_values, pruning=PruningConfig(enabled=False), return_dict=True
    ).pooler_output[0]
    kept = model(**inputs).keep_masks[0]
    folder = CHECKPOINTS / name
    reasons = explain(model.codebook, tokens, provenance_of(folder))
    sources = {file.name: Image.open(file).convert("RGB") for file in (folder / "images").glob("*.png")}
    dropped = [reason for reason in reasons if not kept[reason.token]]
    plot_explanations(image, dropped, sources, round(len(tokens) ** 0.5), path)


def main(folder: Annotated[Path, typer.Argument(help="Where the pictures go.")]) -> None:
    """Draw what the testbed checkpoints keep and why they drop the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    picture_tiles(folder / "kept.png")
    picture_sizes(folder / "sizes.png")
    picture_frames(folder / "frames.png")
    picture_reasons(folder / "why.png")
