"""What pruning costs and saves at prefill, against the least that any pruning could cost.

Three ways of answering the same prompt, interleaved in one run: the stock model; the pruned model; and the oracle,
which gets the kept tokens for free: the stock vision tower, then the stock language model on the embeddings that
pruning would leave. The pruned model may add to the oracle little more than one matrix product, its scores.

    python scripts/benchmark_prefill.py                             # three families, 8 layers of width 512, this CPU
    python scripts/benchmark_prefill.py --device cuda --preset 7b   # the shape of the 7B models, random weights, bf16
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig

from transformers_rbl import (
    LlavaForConditionalGenerationRBL,
    LlavaNextForConditionalGenerationRBL,
    LlavaOnevisionRBL,
    PruningConfig,
    RedundancyCodebook,
)
from transformers_rbl.models.scorers import max_cosine
from transformers_rbl.models.seam import CACHE


OFF = PruningConfig(enabled=False)
RATIOS = (1.0, 0.5, 0.22, 0.11, 0.05)
FAMILIES = {
    "llava": LlavaForConditionalGenerationRBL,
    "llava_next": LlavaNextForConditionalGenerationRBL,
    "llava_onevision": LlavaOnevisionRBL,
}
# The 7B shape is that of each family's checkpoint; the small one has 8 layers of width 512 behind a small tower.
PRESETS = {
    "small": {
        "vision": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6},
        "text": {
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "vocab_size": 32064,
        },
    },
    "7b": {
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128320,
        },
    },
}


def build_model(family: str, preset: str, device: str):
    """Random weights of a family's architecture: CLIP-L/336 or SigLIP-so400m/384 patches, its own language model."""
    sizes, config_class = PRESETS[preset], FAMILIES[family].config_class
    side = 384 if family == "llava_onevision" else 336
    vision = {**sizes["vision"], "image_size": side, "patch_size": 14}
    text = {**sizes["text"], "max_position_embeddings": 16384, "pad_token_id": 0}
    common = {"image_token_index": 3, "tie_word_embeddings": False}
    if family == "llava_onevision":
        common |= {"video_token_index": 4, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        vision, text = SiglipVisionConfig(**vision, vision_use_head=False), Qwen2Config(**text)
    else:
        vision, text = CLIPVisionConfig(**vision), LlamaConfig(**text)
    if family != "llava":
        grids = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
        common["image_grid_pinpoints"] = [[rows * side, columns * side] for rows, columns in grids]
    config = config_class(vision_config=vision, text_config=text, **common)
    dtype = torch.bfloat16 if preset == "7b" else torch.float32
    torch.manual_seed(0)
    default, _ = torch.get_default_dtype(), torch.set_default_dtype(dtype)
    with torch.device(device):
        model = FAMILIES[family](config).eval()
    torch.set_default_dtype(default)
    model.set_codebook(RedundancyCodebook(torch.randn(969, text.hidden_size)))
    return model


def build_inputs(model, device: str):
    """One square photo: the base image, and four tiles where the family has them."""
    side = model.config.vision_config.image_size
    tiled = hasattr(model.config, "image_grid_pinpoints")
    shape = (1, 5, 3, side, side) if tiled else (1, 3, side, side)
    pixels = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device, model.dtype)
    visual = {"pixel_values": pixels}
    if tiled:
        visual["image_sizes"] = torch.tensor([[2 * side, 2 * side]])
    image = len(model.model.token_kinds(**visual)[0])
    ids = torch.cat([torch.arange(10, 30), torch.full((image,), 3), torch.arange(30, 50)])[None].to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **visual}


def transcription(tokens, prototypes, tiles: int):
    """Upstream's steps, with an image's tiles as the batch: normalise tokens and codebook on every call, copy the
    codebook for each tile, batched product, maximum."""
    tokens = torch.nn.functional.normalize(tokens.view(tiles, -1, tokens.shape[-1]), dim=-1)
    book = torch.nn.functional.normalize(prototypes, dim=-1)[None].repeat(tiles, 1, 1)
    return torch.bmm(tokens, book.transpose(1, 2)).max(dim=-1).values.flatten()


def timed(task, device) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    task()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(tasks: dict, rounds: int, device: str, label: str) -> dict[str, list[float]]:
    """Seconds of each task in each of `rounds` rounds, all tasks in every round, in an order that turns."""
    names, seconds = list(tasks), {name: [] for name in tasks}
    for k in tqdm(range(rounds + 2), desc=label, leave=False):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            spent = timed(tasks[name], device)
            if k >= 2:  # two rounds warm up
                seconds[name].append(spent)
    return seconds


def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Median of the paired ratios, with a 95% interval of that median by bootstrap."""
    ratios = np.array(over) / np.array(under)
    draws = np.random.default_rng(0).choice(ratios, size=(2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return float(np.median(ratios)), float(low), float(high)


@torch.inference_mode()
def prefill(model, inputs, keep_ratio: float, rounds: int, device: str) -> dict:
    pruning = PruningConfig(keep_ratio=keep_ratio)
    prefill_only = {"use_cache": True, "logits_to_keep": 1}
    output = model(**inputs, **prefill_only, pruning=pruning)
    ids, slots = inputs["input_ids"], inputs["input_ids"] == 3
    visual = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    kept_ids = ids[output.prompt_mask][None]
    tokens = model.get_image_features(**visual, pruning=OFF).pooler_output[0]
    patches = tokens.float()
    mask, unit = output.keep_masks[0], model.codebook.unit_prototypes

    def oracle():
        features = model.get_image_features(**visual, pruning=OFF)
        features.pooler_output = [features.pooler_output[0][mask]]
        model(input_ids=kept_ids, mm_encoder_outputs={"image": features}, **prefill_only)

    tasks = {
        "stock": lambda: model(**inputs, **prefill_only, pruning=OFF),
        "pruned": lambda: model(**inputs, **prefill_only, pruning=pruning),
        "oracle": oracle,
        "product": lambda: patches @ unit.T,
    }
    seconds = interleave(tasks, rounds, device, f"{model.config.stock_model_type()}, keep_ratio {keep_ratio}")
    floor = [a + b for a, b in zip(seconds["oracle"], seconds["product"])]
    added = [(p - o) / p for p, o in zip(seconds["pruned"], seconds["oracle"])]
    stock_bytes = cache_bytes(model(**inputs, **prefill_only, pruning=OFF)[CACHE])
    return {
        "family": model.config.stock_model_type(),
        "keep_ratio": keep_ratio,
        "visual_tokens": [int(slots.sum()), int(mask.sum())],
        "median_ms": {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
        "pruned_over_stock": ratio(seconds["pruned"], seconds["stock"]),
        "pruned_over_oracle": ratio(seconds["pruned"], seconds["oracle"]),
        "pruned_over_oracle_and_product": ratio(seconds["pruned"], floor),
        "share_of_scoring_and_compaction": statistics.median(added),
        "cache_mib": [stock_bytes / 2**20, cache_bytes(output[CACHE]) / 2**20],
    }


@torch.inference_mode()
def scoring(rounds: int, device: str) -> dict:
    """2,880 tokens against 969 prototypes of width 4,096, float32: the NeXT 7B shape."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2880, 4096, generator=generator).to(device)
    book = RedundancyCodebook(torch.randn(969, 4096, generator=generator)).to(device)
    prototypes, unit = book.prototypes, book.unit_prototypes
    torch.testing.assert_close(max_cosine(tokens, unit), transcription(tokens, prototypes, 5), atol=1e-5, rtol=0)
    tasks = {
        "score": lambda: book.score(tokens),
        "product": lambda: tokens @ unit.T,
        "transcription": lambda: transcription(tokens, prototypes, 5),
        "transcription, tiles flattened": lambda: transcription(tokens, prototypes, 1),
    }
    seconds = interleave(tasks, rounds, device, "scoring")
    return {
        "median_ms": {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
        "score_over_product": ratio(seconds["score"], seconds["product"]),
        "transcription_over_score": ratio(seconds["transcription"], seconds["score"]),
        "flattened_transcription_over_score": ratio(seconds["transcription, tiles flattened"], seconds["score"]),
    }


def cache_bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def show(figures: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*figures)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    family: Annotated[list[str] | None, typer.Option(help="llava, llava_next or llava_onevision; default all.")] = None,
    keep_ratio: Annotated[
        list[float] | None, typer.Option(help="Ratios to measure; default 1, .5, .22, .11, .05.")
    ] = None,
    preset: Annotated[str, typer.Option(help="small (8 layers, width 512) or 7b.")] = "small",
    rounds: Annotated[int, typer.Option(min=7, help="Timed rounds; medians are over these.")] = 15,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's default.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
) -> None:
    """Prefill and scoring, pruned against stock, oracle, and upstream's own steps."""
    if preset not in ("small", "7b") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter("--preset is small or 7b; --device cuda needs a GPU.")
    if unknown := set(family or ()) - set(FAMILIES):
        raise typer.BadParameter(f"--family knows {', '.join(FAMILIES)}, not {', '.join(unknown)}.")
    if threads:
        torch.set_num_threads(threads)
    rows = []
    for name in family or FAMILIES:
        model = build_model(name, preset, device)
        inputs = build_inputs(model, device)
        rows += [prefill(model, inputs, ratio, rounds, device) for ratio in keep_ratio or RATIOS]
        del model
    scores = scoring(rounds, device)
    chip = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    machine = f"{chip}, torch {torch.__version__}, transformers {transformers.__version__}, {datetime.date.today()}"

    table = Table(
        title=f"Prefill, preset {preset}, {machine}\nmedians of {rounds} rounds, [95% interval of the median ratio]"
    )
    columns = (
        "family|keep|tokens|stock ms|pruned ms|oracle ms|pruned/stock|pruned/oracle|pruned/(oracle+product)|added|MiB"
    )
    for column in columns.split("|"):
        table.add_column(column, overflow="fold")
    for row in rows:
        times = row["median_ms"]
        table.add_row(
            row["family"],
            str(row["keep_ratio"]),
            "{}→{}".format(*row["visual_tokens"]),
            f"{times['stock']:.0f}",
            f"{times['pruned']:.0f}",
            f"{times['oracle']:.0f}",
            show(row["pruned_over_stock"]),
            show(row["pruned_over_oracle"]),
            show(row["pruned_over_oracle_and_product"]),
            f"{row['share_of_scoring_and_compaction']:.1%}",
            "{:.1f}→{:.1f}".format(*row["cache_mib"]),
        )
    console = Console(width=150)
    console.print(table)
    console.print("Scoring 2880 x 4096 against 969 prototypes, float32:")
    for name in ("score_over_product", "transcription_over_score", "flattened_transcription_over_score"):
        console.print(f"  {name.replace('_', ' ')}: {show(scores[name])}")
    console.print("  " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in scores["median_ms"].items()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({"machine": machine, "preset": preset, "prefill": rows, "scoring": scores}, indent=2) + "\n"
        )


if __name__ == "__main__":
    typer.run(main)
