"""What pruning costs and saves at prefill, against the least that any pruning could cost.

Ways of answering the same prompt, interleaved in one run: the stock model; the pruned model; and the oracle, which gets
the kept tokens for free: the stock vision tower, then the stock language model on the embeddings that pruning would
leave. The pruned model may add to the oracle little more than one matrix product, its scores. Where most of an image is
blank, or a video stands still, it may do with less: equal tiles or frames encoded once, others only where needed.

    python scripts/benchmark_prefill.py                             # sixteen families, 8 layers of width 512, this CPU
    python scripts/benchmark_prefill.py --device cuda --preset 7b   # the shape of the 7B models, random weights, bf16
    python scripts/benchmark_prefill.py --flops                     # counted, not timed: every shape, on no device
"""

from __future__ import annotations

import datetime
import itertools
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
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, SiglipVisionConfig

from family_shapes import END, IMAGE, SHAPES, START, VIDEO
from transformers_rbl import PruningConfig, RedundancyCodebook, kept_token_count
from transformers_rbl.models.auto_rbl import family_class
from transformers_rbl.models.modeling_rbl import RBLMixin
from transformers_rbl.models.scorers import max_cosine
from transformers_rbl.models.seam import CACHE, MASKS, in_a_row
from transformers_rbl.models.tower_views import up_to_layer


OFF = PruningConfig(enabled=False)
PROTOTYPES = 969
GRIDS = "image_grid_thw"
RATIOS = (1.0, 0.5, 0.22, 0.11, 0.05)
WORDS = (range(10, 30), range(30, 50))  # ids before and behind the image
ALONG = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
# Of these there are released shapes too; those of `family_shapes.py` have the small one alone.
FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen3_vl")
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


# Shapes of released checkpoints, by the name of a preset: family, sizes, and what is asked about.
ONEVISION_7B = {
    "vision": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16},
    "text": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152128,
    },
}
QWEN3_VL_8B = {
    "vision": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
    "text": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 151936,
    },
}
PRESETS |= {"qwen3-vl-8b": QWEN3_VL_8B, "onevision-36-tiles": ONEVISION_7B, "video-32": ONEVISION_7B}
FAMILY_OF = {"qwen3-vl-8b": "qwen3_vl", "onevision-36-tiles": "llava_onevision", "video-32": "llava_onevision"}
TILES = {"onevision-36-tiles": (6, 6)}  # rows and columns; 2 x 2 elsewhere
FRAMES = {"video-32": 32}
SKIPPED = ("qwen3_vl", "7b")  # that preset is of LLaVA's shapes
PATCHES = {"small": 32, "qwen3-vl-8b": 64}  # of Qwen3-VL's image, along a side: 512 and 1,024 pixels


def build_model(family: str, preset: str, device: str):
    """Random weights of a family's architecture: CLIP-L/336 or SigLIP-so400m/384 patches, its own language model."""
    model_class = family_class(family)
    if family in SHAPES:
        config = SHAPES[family].config(model_class.config_class, PRESETS[preset])
    else:
        config = released_config(family, preset, model_class.config_class)
    dtype = torch.float32 if preset == "small" else torch.bfloat16
    torch.manual_seed(0)
    default, _ = torch.get_default_dtype(), torch.set_default_dtype(dtype)
    with torch.device(device):
        model = model_class(config).eval()
    torch.set_default_dtype(default)
    if device != "meta":
        model.set_codebook(RedundancyCodebook(torch.randn(PROTOTYPES, config.get_text_config().hidden_size)))
    return model


def released_config(family: str, preset: str, config_class: type):
    """The config of one of the families that have released shapes, at the sizes of a preset."""
    sizes = PRESETS[preset]
    side = 384 if family == "llava_onevision" else 336
    text = {**sizes["text"], "max_position_embeddings": 32768, "pad_token_id": 0}
    common = {"tie_word_embeddings": False}
    if family == "qwen3_vl":
        depth, heads = sizes["vision"]["num_hidden_layers"], sizes["vision"]["num_attention_heads"]
        vision = {
            **{name: sizes["vision"][name] for name in ("hidden_size", "intermediate_size")},
            **{"depth": depth, "num_heads": heads, "out_hidden_size": text["hidden_size"], "patch_size": 16},
            "deepstack_visual_indexes": [depth // 4, depth // 2, depth - 2],
        }
        head = text["hidden_size"] // text["num_attention_heads"]
        sections = [head // 2 - 2 * (head // 6), head // 6, head // 6]
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
        text |= {"head_dim": head, "rope_parameters": rope}
        common |= {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
        }
    else:
        vision = {**sizes["vision"], "image_size": side, "patch_size": 14}
        common |= {"image_token_index": IMAGE}
        if family == "llava_onevision":
            common |= {"video_token_index": VIDEO, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
            vision, text = SiglipVisionConfig(**vision, vision_use_head=False), Qwen2Config(**text)
        else:
            vision, text = CLIPVisionConfig(**vision), LlamaConfig(**text)
        if family != "llava":
            grids = {(1, 2), (2, 1), (2, 2), (3, 1), (1, 3), TILES.get(preset, (2, 2))}
            common["image_grid_pinpoints"] = [[rows * side, columns * side] for rows, columns in sorted(grids)]
    return config_class(vision_config=vision, text_config=text, **common)


def build_inputs(model, preset: str, device: str, batch: int = 1, blank: bool = False):
    """Square photos, one a prompt: the base image, and tiles where the family has them; or one video. With `blank`, all
    tiles but the first are one colour."""
    generator, family = torch.Generator().manual_seed(0), model.config.stock_model_type()
    if family in SHAPES:
        return shaped_inputs(model, batch, device)
    if family == "qwen3_vl":
        side, vision = PATCHES[preset], model.config.vision_config
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        visual = {"pixel_values": torch.randn(batch * side**2, width, generator=generator).to(device, model.dtype)}
        visual["image_grid_thw"] = torch.tensor([[1, side, side]] * batch, device=device)
    else:
        side, (rows, columns) = model.config.vision_config.image_size, TILES.get(preset, (2, 2))
        tiled = hasattr(model.config, "image_grid_pinpoints")
        name, count = ("pixel_values_videos", FRAMES[preset]) if preset in FRAMES else ("pixel_values", 1)
        count = 1 + rows * columns if name == "pixel_values" and tiled else count
        pixels = torch.randn(batch, count, 3, side, side, generator=generator)
        if blank:
            pixels[:, 2:] = 0.5
        pixels = pixels if tiled else pixels[:, 0]
        visual = {name: pixels.to(device, model.dtype)}
        if tiled and name == "pixel_values":
            visual["image_sizes"] = torch.tensor([[rows * side, columns * side]] * batch)
    modality, placeholder = ("video", VIDEO) if "pixel_values_videos" in visual else ("image", IMAGE)
    length = len(model.model.layouts(modality, **visual)[0])
    image = [placeholder] * length
    ids = prompts([START, *image, END] if family == "qwen3_vl" else image, batch, device)
    if family == "qwen3_vl":
        visual["mm_token_type_ids"] = (ids == placeholder).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **visual}


def shaped_inputs(model, batch: int, device: str):
    """Prompts with the picture of `family_shapes.py`."""
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES[model.config.stock_model_type()]
    pictures = [shape.picture(lambda *size: torch.randn(size, generator=generator)) for _ in range(batch)]
    ids = prompts(pictures[0].ids, batch, device)
    visual = {}
    for name in pictures[0].tensors:
        values = torch.cat([picture.tensors[name] for picture in pictures])
        visual[name] = values.to(device, model.dtype if values.is_floating_point() else None)
    if pictures[0].types is not None:
        visual[pictures[0].types] = torch.zeros_like(ids) if pictures[0].prefix else (ids == IMAGE).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **visual}


def prompts(picture: list[int], batch: int, device: str) -> torch.Tensor:
    """`(batch, n)` ids: words, the picture, words."""
    return torch.tensor([[*WORDS[0], *picture, *WORDS[1]]] * batch, device=device)


def transcription(tokens, prototypes, tiles: int):
    """Upstream's steps, with an image's tiles as the batch: normalise tokens and codebook on every call, copy the
    codebook for each tile, batched product, maximum."""
    tokens = torch.nn.functional.normalize(tokens.view(tiles, -1, tokens.shape[-1]), dim=-1)
    book = torch.nn.functional.normalize(prototypes, dim=-1)[None].repeat(tiles, 1, 1)
    return torch.bmm(tokens, book.transpose(1, 2)).max(dim=-1).values.flatten()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]  # `main` chooses


def timed(task, device) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    task()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


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


PREFILL_ONLY = {"use_cache": True, "logits_to_keep": 1}


def oracle(model, inputs, output):
    """A call that costs what any pruning must: stock's tower, and stock's language model on the tokens that `output`,
    of the pruned model, kept."""
    modality = "video" if "pixel_values_videos" in inputs else "image"
    visual = {name: value for name, value in inputs.items() if name not in ALONG}
    encode, batch = getattr(model, f"get_{modality}_features"), len(inputs["input_ids"])
    masks = output[MASKS[modality]]
    kept = {name: inputs[name][output.prompt_mask].view(batch, -1) for name in ALONG if name in inputs}
    if GRIDS in inputs:  # where kept tokens lie in their image, as the pruned model would say
        positions, _ = model.model.get_rope_index(
            **{name: inputs[name] for name in ("input_ids", "mm_token_type_ids", "attention_mask", GRIDS)}
        )
        kept["position_ids"] = torch.stack([axis[output.prompt_mask].view(batch, -1) for axis in positions])
    lengths = [len(mask) for mask in masks]

    def call():
        features = encode(**visual, pruning=OFF, return_dict=True)
        images = in_a_row(features.pooler_output).split(lengths)
        features.pooler_output = [image[mask] for image, mask in zip(images, masks)]
        if (layers := features.get("deepstack_features")) is not None:
            features.deepstack_features = [[part[mask] for part, mask in zip(layer, masks)] for layer in layers]
        return model(**kept, mm_encoder_outputs={modality: features}, **PREFILL_ONLY)

    return call


@torch.inference_mode()
def prefill(model, inputs, keep_ratio: float, rounds: int, device: str) -> dict:
    """Seconds of stock, pruned and oracle, and what they are spent on."""
    pruning = PruningConfig(keep_ratio=keep_ratio)
    output = model(**inputs, **PREFILL_ONLY, pruning=pruning)
    masks = output.get("keep_masks") or output["video_keep_masks"]
    patches = torch.randn(sum(len(mask) for mask in masks), model.config.get_text_config().hidden_size, device=device)
    unit = model.codebook.unit_prototypes
    tasks = {
        "stock": lambda: model(**inputs, **PREFILL_ONLY, pruning=OFF),
        "pruned": lambda: model(**inputs, **PREFILL_ONLY, pruning=pruning),
        "oracle": oracle(model, inputs, output),
        "product": lambda: patches @ unit.T,
    }
    if model.dtype == torch.float32:  # the oracle is told what to keep, and gives the same answer
        torch.testing.assert_close(tasks["oracle"]().logits, output.logits, atol=1e-3, rtol=0)
    seconds = interleave(tasks, rounds, device, f"{model.config.stock_model_type()}, keep_ratio {keep_ratio}")
    floor = [a + b for a, b in zip(seconds["oracle"], seconds["product"])]
    added = [(p - o) / p for p, o in zip(seconds["pruned"], seconds["oracle"])]
    stock_bytes = cache_bytes(tasks["stock"]()[CACHE])
    return {
        "family": model.config.stock_model_type(),
        "batch": len(inputs["input_ids"]),
        "keep_ratio": keep_ratio,
        "visual_tokens": [sum(len(mask) for mask in masks), sum(int(mask.sum()) for mask in masks)],
        "median_ms": {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
        "pruned_over_stock": ratio(seconds["pruned"], seconds["stock"]),
        "pruned_over_oracle": ratio(seconds["pruned"], seconds["oracle"]),
        "pruned_over_oracle_and_product": ratio(seconds["pruned"], floor),
        "share_of_scoring_and_compaction": statistics.median(added),
        "parts_ms": parts(model, tasks["pruned"], rounds, device),
        "cache_mib": [stock_bytes / 2**20, cache_bytes(output[CACHE]) / 2**20],
        "peak_mib": {name: peak(tasks[name]) for name in ("stock", "pruned")} if device == "cuda" else None,
    }


def parts(model, call, rounds: int, device: str) -> dict[str, float]:
    """Median milliseconds of the pruned call's parts, in rounds of their own: each end waits for the device."""
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        marks[name] = clock()

    headless, compact = model.model, RBLMixin._compact

    def compacted(self, *args):
        mark("score")
        compact(self, *args)

    hooks = [
        headless.get_submodule(model.family.projector).register_forward_hook(lambda *_: mark("tower")),
        model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: mark("compact")),
    ]
    RBLMixin._compact = compacted
    spent: dict[str, list[float]] = {}
    try:
        for _ in range(rounds):
            mark("start")
            call()
            mark("language model")
            names = ("start", "tower", "score", "compact", "language model")
            for before, name in itertools.pairwise(names):
                spent.setdefault(name, []).append(marks[name] - marks[before])
    finally:
        RBLMixin._compact = compact
        for hook in hooks:
            hook.remove()
    return {name: statistics.median(times) * 1e3 for name, times in spent.items()}


def peak(call) -> float:
    """Most MiB of GPU memory that are in use during a call, weights included."""
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**20


@torch.inference_mode()
def decoding(model, inputs, keep_ratio: float, rounds: int, device: str) -> dict[str, float]:
    """Tokens a second while 64 are decoded, the prefill taken off."""

    def generate(pruning: PruningConfig, count: int):
        settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return lambda: model.generate(**inputs, **settings, pruning=pruning)

    rules = {"stock": OFF, "pruned": PruningConfig(keep_ratio=keep_ratio)}
    tasks = {f"{name} {count}": generate(rule, count) for name, rule in rules.items() for count in (1, 65)}
    seconds = {name: statistics.median(times) for name, times in interleave(tasks, rounds, device, "decoding").items()}
    return {name: len(inputs["input_ids"]) * 64 / (seconds[f"{name} 65"] - seconds[f"{name} 1"]) for name in rules}


@torch.inference_mode()
def empty_parts(model, inputs, rules: dict[str, dict], keep_ratio: float, rounds: int, device: str, what: str) -> dict:
    """A prompt whose tiles or frames are mostly empty, under rules that encode fewer of them: passes of the tower, and
    time against the oracle, which encodes them all as stock does."""
    rows: list[int] = []
    layer = next(module for name, module in model.model.vision_tower.named_modules() if name.endswith("layers.0"))
    hook = layer.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    output = model(**inputs, **PREFILL_ONLY, pruning=PruningConfig(keep_ratio=keep_ratio, encode_once=False))
    tasks, passes = {"oracle": oracle(model, inputs, output)}, {}
    for name, settings in rules.items():
        rule = PruningConfig(keep_ratio=keep_ratio, **settings)
        tasks[name] = lambda rule=rule: model(**inputs, **PREFILL_ONLY, pruning=rule)
    for name, task in tasks.items():
        rows.clear()
        task()
        passes[name] = sum(rows)
    hook.remove()
    seconds = interleave(tasks, rounds, device, what)
    return {
        "family": model.config.stock_model_type(),
        "what": what,
        "keep_ratio": keep_ratio,
        "tower_passes": passes,
        "median_ms": {name: statistics.median(times) * 1e3 for name, times in seconds.items()},
        "over_oracle": {name: ratio(times, seconds["oracle"]) for name, times in seconds.items()},
    }


EVERY = {"encode_once": False}
# On noise, what a thumbnail asks for is chance's choice: this model's weights are random.
OF_TILES = {
    "every tile": EVERY,
    "equal tiles once": {},
    "where needed": {"tiles": "where_needed"},
    "base": {"tiles": "base"},
}
OF_FRAMES = {"every frame": EVERY, "equal frames once": {}, "where needed": {"frames": "where_needed"}}


def still_video(model, device: str, noise: float, frames: int = 16, scenes: int = 4) -> dict:
    """A video in which each scene is held for `frames / scenes` frames under a camera's noise."""
    generator, side = torch.Generator().manual_seed(0), model.config.vision_config.image_size
    pictures = torch.randn(scenes, 3, side, side, generator=generator).repeat_interleave(frames // scenes, 0)
    pixels = pictures + noise * torch.randn(pictures.shape, generator=generator)
    visual = {"pixel_values_videos": pixels[None].to(device, model.dtype)}
    ids = prompts([VIDEO] * len(model.model.layouts("video", **visual)[0]), 1, device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **visual}


def all_empty_parts(model, preset: str, rounds: int, device: str) -> list[dict]:
    """Of a family with tiles: an image of which all tiles but one are blank; of LLaVA-OneVision, videos that stand
    still, exactly or under noise."""
    cases = []
    if hasattr(model.config, "image_grid_pinpoints") and preset not in FRAMES:
        cases.append(("blank tiles", build_inputs(model, preset, device, blank=True), OF_TILES))
    if model.config.stock_model_type() == "llava_onevision":
        cases += [
            (f"still video, {name}", still_video(model, device, noise), OF_FRAMES)
            for name, noise in (("exactly", 0.0), ("under noise", 0.02))
        ]
    return [empty_parts(model, inputs, rules, 0.11, rounds, device, what) for what, inputs, rules in cases]


def flops(preset: str, family: str, keep_ratio: float) -> dict:
    """TFLOP of a prompt's parts, counted by `torch.utils.flop_counter` on the meta device, where nothing is computed;
    of Qwen3-VL's tower, whose code reads its grid, by the formula of its products."""
    model = build_model(family, preset, "meta")
    rows, columns = TILES.get(preset, (2, 2))
    width, text = model.config.get_text_config().hidden_size, 40

    def counted(call) -> float:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        return counter.get_total_flops() / 1e12

    def language(length: int) -> float:
        embeds = torch.empty(1, length, width, device="meta", dtype=model.dtype)
        body = counted(lambda: model.model.language_model(inputs_embeds=embeds, use_cache=True))
        return body + 2 * width * model.config.get_text_config().vocab_size / 1e12

    vision = model.config.vision_config
    if family == "qwen3_vl":
        patches, merged = PATCHES[preset] ** 2, vision.spatial_merge_size**2
        layer = 2 * patches * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
        tower = vision.depth * (layer + 4 * patches**2 * vision.hidden_size) / 1e12
        tower_run, passes, frames, row_ends = tower, 1, 1, 0
        tokens = patches // merged
    else:
        pixels = torch.empty(1, 3, vision.image_size, vision.image_size, device="meta", dtype=model.dtype)
        tower = counted(lambda: model.model.vision_tower(pixels))
        _, settings = model.family.stopped(model.model, {})
        view = up_to_layer(model.model, settings.get("vision_feature_layer", vision.num_hidden_layers))
        tower_run = counted(lambda: view.vision_tower(pixels))
        tiled = hasattr(model.config, "image_grid_pinpoints")
        frames = FRAMES.get(preset, 1)
        passes = frames if preset in FRAMES else 1 + rows * columns if tiled else 1
        modality, name = ("video", "pixel_values_videos") if preset in FRAMES else ("image", "pixel_values")
        shape = (1, passes, *pixels.shape[1:]) if tiled else pixels.shape
        visual = {name: torch.empty(shape, device="meta")}
        if tiled and modality == "image":
            side = vision.image_size
            visual["image_sizes"] = torch.tensor([[rows * side, columns * side]])
        layout = model.model.layouts(modality, **visual)[0]
        tokens, row_ends = layout.numbers_scored, len(layout) - layout.numbers_scored
    kept = frames * kept_token_count(tokens // frames, keep_ratio)
    return {
        "preset": preset,
        "family": family,
        "keep_ratio": keep_ratio,
        "visual_tokens": [tokens + row_ends, kept + row_ends],
        "tower_passes": passes,
        "tower_of_one_pass": tower,
        "tower": passes * tower,
        "tower_up_to_the_selected_layer": passes * tower_run,
        "scores": 2 * tokens * PROTOTYPES * width / 1e12,
        "language_model": language(text + tokens + row_ends),
        "language_model_pruned": language(text + kept + row_ends),
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
    """Of keys and values; layers without attention (LFM2's) hold none."""
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


def show(figures: tuple[float, float, float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*figures)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    family: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join([*FAMILIES, *SHAPES])}; default all of a preset.")
    ] = None,
    keep_ratio: Annotated[
        list[float] | None, typer.Option(help="Ratios to measure; default 1, .5, .22, .11, .05.")
    ] = None,
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))] = "small",
    rounds: Annotated[int, typer.Option(min=3, help="Timed rounds; medians are over these.")] = 15,
    batch: Annotated[list[int] | None, typer.Option(help="Prompts at a time; default 1.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's default.")] = 0,
    clock_name: Annotated[
        str, typer.Option("--clock", help="wall, or cpu: this process's seconds, for a machine that others use too.")
    ] = "wall",
    decoded_too: Annotated[bool, typer.Option("--decoding/--no-decoding", help="Time decoding too.")] = True,
    emptied: Annotated[bool, typer.Option("--empty/--no-empty", help="Time blank tiles and still videos too.")] = True,
    scored: Annotated[bool, typer.Option("--scoring/--no-scoring", help="Time the scores alone too.")] = True,
    count_flops: Annotated[bool, typer.Option("--flops", help="Count FLOPs of all presets instead.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
) -> None:
    """Prefill and scoring, pruned against stock, oracle, and upstream's own steps."""
    if preset not in PRESETS or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"--preset is one of {', '.join(PRESETS)}; --device cuda needs a GPU.")
    families = [FAMILY_OF[preset]] if preset in FAMILY_OF else [name for name in FAMILIES if (name, preset) != SKIPPED]
    families += SHAPES if preset == "small" else []
    if unknown := set(family or ()) - set(families):
        raise typer.BadParameter(
            f"--family with preset {preset} knows {', '.join(families)}, not {', '.join(unknown)}."
        )
    if clock_name not in CLOCKS:
        raise typer.BadParameter(f"--clock is {' or '.join(CLOCKS)}.")
    globals()["clock"] = CLOCKS[clock_name]
    if threads:
        torch.set_num_threads(threads)
    console = Console(width=160)
    if count_flops:
        figures = [
            flops(name, of, one) for one in keep_ratio or (0.22, 0.11) for name in PRESETS if name != "small"
            for of in ([FAMILY_OF[name]] if name in FAMILY_OF else [f for f in FAMILIES if (f, name) != SKIPPED])
        ]  # fmt: skip
        show_flops(console, figures)
        return write(out, {"flops": figures, "torch": torch.__version__, "transformers": transformers.__version__})
    chip = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    machine = f"{chip}, torch {torch.__version__}, transformers {transformers.__version__}, {datetime.date.today()}"
    about = {"machine": machine, "preset": preset, "clock": clock_name, "rounds": rounds}
    rows, decoded, empty = [], [], []
    for name in family or families:
        model = build_model(name, preset, device)
        for size in batch or [1]:
            inputs = build_inputs(model, preset, device, size)
            rows += [prefill(model, inputs, one, rounds, device) for one in keep_ratio or RATIOS]
            if decoded_too:
                speeds = decoding(model, inputs, 0.11, max(3, rounds // 5), device)
                decoded.append({"family": name, "batch": size, "keep_ratio": 0.11, "tokens_per_second": speeds})
        if emptied and name in FAMILIES:
            empty += all_empty_parts(model, preset, rounds, device)
        del model
        write(out, about | {"prefill": rows, "decoding": decoded, "empty_parts": empty})  # as far as it has come
    scores = scoring(rounds, device) if scored else None
    table = Table(
        title=f"Prefill, preset {preset}, {machine}\nmedians of {rounds} rounds, [95% interval of the median ratio]"
    )
    columns = (
        "family|batch|keep|tokens|stock ms|pruned ms|oracle ms|pruned/stock|pruned/oracle|pruned/(oracle+product)"
        "|tower|score|compact|language model|MiB"
    )
    for column in columns.split("|"):
        table.add_column(column, overflow="fold")
    for row in rows:
        times = row["median_ms"]
        table.add_row(
            row["family"],
            str(row["batch"]),
            str(row["keep_ratio"]),
            "{}→{}".format(*row["visual_tokens"]),
            *(f"{times[name]:.0f}" for name in ("stock", "pruned", "oracle")),
            *(show(row[f"pruned_over_{name}"]) for name in ("stock", "oracle", "oracle_and_product")),
            *(f"{row['parts_ms'][name]:.1f}" for name in ("tower", "score", "compact", "language model")),
            "{:.1f}→{:.1f}".format(*row["cache_mib"]),
        )
    console.print(table)
    for row in decoded:
        speeds = row["tokens_per_second"]
        console.print(
            f"{row['family']}, batch {row['batch']}: {speeds['stock']:.1f} tokens a second decoded by stock, "
            f"{speeds['pruned']:.1f} pruned to {row['keep_ratio']}"
        )
    for row in empty:
        console.print(f"{row['family']}, {row['what']}, keep_ratio {row['keep_ratio']}:")
        for name, figures in row["over_oracle"].items():
            passes, spent = row["tower_passes"][name], row["median_ms"][name]
            console.print(f"  {name}: {passes} passes of the tower, {spent:.0f} ms, {show(figures)} of the oracle's")
    if scores is not None:
        console.print("Scoring 2880 x 4096 against 969 prototypes, float32:")
        for name in ("score_over_product", "transcription_over_score", "flattened_transcription_over_score"):
            console.print(f"  {name.replace('_', ' ')}: {show(scores[name])}")
        console.print("  " + ", ".join(f"{name} {ms:.0f} ms" for name, ms in scores["median_ms"].items()))
    write(out, about | {"prefill": rows, "decoding": decoded, "empty_parts": empty, "scoring": scores})


def show_flops(console: Console, figures: list[dict]) -> None:
    table = Table(title="TFLOP of one prompt, counted")
    for column in "preset|family|keep|tokens|passes|tower|up to its layer|scores|language model|pruned|all".split("|"):
        table.add_column(column)
    for row in figures:
        whole = row["tower"] + row["language_model"]
        pruned = row["tower_up_to_the_selected_layer"] + row["scores"] + row["language_model_pruned"]
        table.add_row(
            row["preset"],
            row["family"],
            str(row["keep_ratio"]),
            "{}→{}".format(*row["visual_tokens"]),
            str(row["tower_passes"]),
            f"{row['tower']:.2f}",
            f"{row['tower_up_to_the_selected_layer']:.2f}",
            f"{row['scores']:.3f}",
            f"{row['language_model']:.2f}",
            f"{row['language_model_pruned']:.2f}",
            f"{whole:.2f}→{pruned:.2f}",
        )
    console.print(table)


def write(out: Path | None, figures: dict) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
