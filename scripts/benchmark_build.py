"""What probing one image costs: ours, upstream's procedure written out literally, and the arithmetic that must be done.

Both sides get the same model, image and targets, interleaved in one run. The transcription makes one `generate` call of
8 tokens for each input, batch 1, with the vision tower run twice for each, and shares nothing. The bound counts the
FLOPs of every token that no input shares with an earlier one, at the rate that this machine reaches on one large
batched forward pass of the language model.

    python scripts/benchmark_build.py                              # 8 layers of width 512, CLIP of 6 layers, this CPU
    python scripts/benchmark_build.py --device cuda --preset 7b    # the 7B shape, random weights, bf16
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import platform
import statistics
import threading
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmark_prefill import PRESETS, timed
from transformers_rbl.building.measures import answer_confidence, answer_divergence, neighbourhoods
from transformers_rbl.building.probing import Prober
from transformers_rbl.building.recipe import Recipe
from transformers_rbl.building.showing import show_base


PREFIX, SUFFIX = 20, 30  # text tokens before and after the 576 of the image
ANSWER = 8


def build_model(preset: str, device: str):
    sizes = PRESETS[preset]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes["vision"], image_size=336, patch_size=14),
        text_config=LlamaConfig(**sizes["text"], max_position_embeddings=4096, pad_token_id=0),
        image_token_index=3,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if preset == "7b" else torch.float32)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(default)
    return model


class Transcription:
    """Upstream's procedure: every input by itself, from pixels to eight generated tokens."""

    def __init__(self, model, recipe: Recipe, pixels: torch.Tensor, positions: torch.Tensor):
        self.model, self.recipe, self.pixels, self.positions = model, recipe, pixels, positions
        self.around = neighbourhoods(positions, 24)
        embed, device = model.get_input_embeddings(), model.device
        with torch.no_grad():
            self.prefix = embed(torch.arange(10, 10 + PREFIX, device=device))
            self.suffix = embed(torch.arange(50, 50 + SUFFIX, device=device))
            self.pad = embed(torch.tensor(0, device=device))

    @torch.no_grad()
    def call(self, choose) -> torch.Tensor:
        """Logits of the first answer token, for the visual tokens that `choose` makes of an image's."""
        for _ in range(2):
            tokens = self.model.get_image_features(self.pixels[None], return_dict=True).pooler_output[0]
        embeds = torch.cat([self.prefix, choose(tokens), self.suffix])[None]
        return self.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=2,
            return_dict_in_generate=True,
            output_logits=True,
        ).logits[0][0]

    def without(self, tokens, gone):
        tokens = tokens.clone()
        tokens[gone] = self.pad
        return tokens

    def probe(self, bar=None) -> dict[str, torch.Tensor]:
        p1, local, globally = [], [], []
        whole = self.call(lambda tokens: tokens)
        for position, around in zip(self.positions.tolist(), self.around):
            place = int((around == position).nonzero())
            alone = self.call(lambda tokens, p=position: tokens[p : p + 1])
            patch = self.call(lambda tokens, a=around: tokens[a])
            left = self.call(lambda tokens, a=around, i=place: self.without(tokens[a], [i]))
            rest = self.call(lambda tokens, a=around: self.without(tokens, a))
            p1.append(answer_confidence(alone))
            local.append(answer_divergence(patch, left))
            globally.append(answer_divergence(whole, rest))
            if bar is not None:
                bar.update()
        return {"p1": torch.stack(p1), "local": torch.stack(local), "global": torch.stack(globally)}


class PeakMemory:
    """The most that a block took beyond what was taken before: of the GPU's memory, or of this process's."""

    def __init__(self, device: str):
        self.device, self.mib = device, 0.0

    def _taken(self) -> float:
        if self.device == "cuda":
            return torch.cuda.memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 2**10

    def _watch(self):
        while not self._done.wait(0.02):
            self.mib = max(self.mib, self._taken() - self._before)

    def __enter__(self):
        gc.collect()
        if self.device == "cpu" and platform.libc_ver()[0] == "glibc":
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # else what the other side has freed would be used unseen
        self._before, self._done = self._taken(), threading.Event()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch)
            self._thread.start()
        return self

    def __exit__(self, *error):
        if self.device == "cuda":
            self.mib = torch.cuda.max_memory_allocated() / 2**20 - self._before
        else:
            self._done.set()
            self._thread.join()


def flops(config, sequences: list[tuple[int, int, int]]) -> float:
    """Of the language model, for (count, tokens already known, new tokens): two per weight and token, attention over
    what each token sees, and the vocabulary once a sequence."""
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    attention = text.hidden_size * head * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    weights = text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size)
    total = 0.0
    for count, known, new in sequences:
        seen = new * known + new * (new + 1) / 2
        total += count * (2 * weights * new + 4 * text.num_hidden_layers * text.hidden_size * seen)
        total += count * 2 * text.hidden_size * text.vocab_size
    return total


def tower_flops(config) -> float:
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    layers = vision.num_hidden_layers - 1  # what feature layer -2 reads
    return layers * (2 * weights * tokens + 4 * vision.hidden_size * tokens**2)


def necessary(config, positions: torch.Tensor) -> dict[str, float]:
    """FLOPs by experiment of every token that no input shares with an earlier one."""
    count, image = len(positions), 576
    starts = neighbourhoods(positions, 24).amin(dim=1).tolist()
    return {
        "vision tower": tower_flops(config),
        "single input": flops(config, [(count, PREFIX, 1 + SUFFIX)]),
        "local": flops(config, [(2 * count, PREFIX, 9 + SUFFIX)]),
        "global": flops(config, [(1, PREFIX, image + SUFFIX), *((1, PREFIX + s, image - s + SUFFIX) for s in starts)]),
    }


def ours(prober: Prober, pixels: torch.Tensor, positions: torch.Tensor, device: str) -> tuple[dict, dict[str, float]]:
    """The three experiments, each timed."""
    prefix, suffix = list(range(10, 10 + PREFIX)), list(range(50, 50 + SUFFIX))
    around, seconds, results = neighbourhoods(positions, 24), {}, {}

    def step(name, task):
        def run():
            results[name] = task()

        seconds[name] = timed(run, device)

    with torch.no_grad():
        step("vision tower", lambda: show_base(prober.model, prefix, suffix, pixels))
        shown = results["vision tower"]
        step("single input", lambda: answer_confidence(prober.single_input(shown, positions)))
        step("local", lambda: answer_divergence(*prober.local_leave_one_out(shown, positions, around)))
        step("global", lambda: answer_divergence(*prober.global_leave_one_out(shown, around)))
    return {"p1": results["single input"], "local": results["local"], "global": results["global"]}, seconds


def transcribe(literal: Transcription, bar, device: str) -> tuple[dict, float]:
    results = {}
    seconds = timed(lambda: results.update(literal.probe(bar)), device)
    return results, seconds


@torch.no_grad()
def large_forward_rate(model, device: str, batch: int) -> float:
    """FLOP/s of one batched forward pass of whole prompts."""
    length = PREFIX + 576 + SUFFIX
    embeds = torch.randn(batch, length, model.config.text_config.hidden_size, device=device).to(model.dtype) * 0.02

    def run():
        output = model.model.language_model(inputs_embeds=embeds, use_cache=False)
        model.lm_head(output.last_hidden_state[:, -1])

    return flops(model.config, [(batch, 0, length)]) / timed(run, device)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    preset: Annotated[str, typer.Option(help="small (8 layers, width 512) or 7b.")] = "small",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each with both sides.")] = 3,
    targets: Annotated[int, typer.Option(min=8, max=576, help="Tokens probed in the image.")] = 96,
    max_tokens_per_batch: Annotated[int, typer.Option(min=1)] = 8192,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
) -> None:
    """Probing one image: ours, the transcription, and the bound."""
    if preset not in PRESETS or device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter("--preset is small or 7b; --device cuda needs a GPU.")
    model = build_model(preset, device)
    pixels = torch.randn(3, 336, 336, generator=torch.Generator().manual_seed(0)).to(device, model.dtype)
    positions = torch.linspace(0, 575, targets).long()
    recipe = Recipe(targets={"by": "positions", "positions": positions.tolist()}, pad_token_id=0)
    prober = Prober(model, recipe, max_tokens_per_batch=max_tokens_per_batch)
    literal = Transcription(model, recipe, pixels, positions)
    work = necessary(model.config, positions)

    few = positions[:: max(1, targets // 4)]
    ours(prober, pixels, few, device)  # warm up
    Transcription(model, recipe, pixels, few[:2]).probe()
    rates = [large_forward_rate(model, device, 8)]
    rows, memory, shares, worst = [], {"ours": 0.0, "transcription": 0.0}, [], 0.0
    with tqdm(total=rounds * targets, unit="target", desc="transcription") as bar:
        for _ in range(rounds):
            rates.append(large_forward_rate(model, device, 8))
            with PeakMemory(device) as peak:
                mine, seconds = ours(prober, pixels, positions, device)
            memory["ours"] = max(memory["ours"], peak.mib)
            rates.append(large_forward_rate(model, device, 8))
            with PeakMemory(device) as peak:
                theirs, literally = transcribe(literal, bar, device)
            memory["transcription"] = max(memory["transcription"], peak.mib)
            total, rate = sum(seconds.values()), statistics.median(rates[-2:])
            rows.append((total, literally, sum(work.values()) / rate))
            shares.append({name: value / total for name, value in seconds.items()})
            worst = max(worst, *(float((mine[k].cpu() - theirs[k].cpu()).abs().max()) for k in mine))

    ratios = {
        "ours/transcription": statistics.median(a / b for a, b, _ in rows),
        "ours/bound": statistics.median(a / c for a, _, c in rows),
    }
    share = {name: statistics.median(s[name] for s in shares) for name in shares[0]}
    chip = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    machine = f"{chip}, torch {torch.__version__}, transformers {transformers.__version__}, {datetime.date.today()}"
    table = Table(title=f"Probing one image, {targets} targets, preset {preset}\n{machine}, medians of {rounds} rounds")
    for column in ("", "seconds", "peak memory, MiB"):
        table.add_column(column)
    table.add_row("ours", f"{statistics.median(r[0] for r in rows):.2f}", f"{memory['ours']:.0f}")
    table.add_row("transcription", f"{statistics.median(r[1] for r in rows):.2f}", f"{memory['transcription']:.0f}")
    table.add_row(f"bound, {sum(work.values()) / 1e12:.2f} TFLOP", f"{statistics.median(r[2] for r in rows):.2f}", "")
    console = Console(width=110)
    console.print(table)
    console.print(
        f"ours/transcription {ratios['ours/transcription']:.3f}, ours/bound {ratios['ours/bound']:.2f}, "
        f"rate {statistics.median(rates) / 1e9:.0f} GFLOP/s, largest difference {worst:.1e}"
    )
    console.print("share of time: " + ", ".join(f"{name} {value:.0%}" for name, value in share.items()))
    console.print("share of FLOPs: " + ", ".join(f"{n} {v / sum(work.values()):.0%}" for n, v in work.items()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        figures = {
            "machine": machine,
            "preset": preset,
            "targets": targets,
            "rounds": [list(row) for row in rows],
            "ratios": ratios,
            "share_of_time": share,
            "flops": work,
            "rate": statistics.median(rates),
            "peak_mib": memory,
            "largest_difference": worst,
            "max_tokens_per_batch": max_tokens_per_batch,
        }
        out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
