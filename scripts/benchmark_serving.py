"""vLLM with a pruned checkpoint and with the stock one it was made from: throughput, time to first token, KV cache.

Both servers run at once and are asked in turn, so that what else the machine does meets both. Every request has an
image of its own; prefix and image caches are off.

    python scripts/benchmark_serving.py                             # 8 layers of width 512, this CPU
    python scripts/benchmark_serving.py --preset 7b --device cuda   # the shape of the 7B model, random weights, bf16
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import io
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from openai import OpenAI
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import tiny_checkpoint
from benchmark_prefill import PRESETS, build_model, ratio
from transformers_rbl import PruningConfig


MAX_TOKENS = 16


def make_checkpoints(folder: Path, preset: str, keep_ratio: float) -> dict[str, Path]:
    """A LLaVA-NeXT with random weights as our class saves it, and the same weights as a stock checkpoint."""
    pruned, stock = folder / "pruned", folder / "stock"
    model = build_model("llava_next", preset, "cpu")
    model.pruning = PruningConfig(keep_ratio=keep_ratio)
    model.save_pretrained(pruned)
    for path in (pruned, stock):
        tiny_checkpoint.processor(model.config).save_pretrained(path)
    config = json.loads((pruned / "config.json").read_text())
    for name in ("pruning", "num_prototypes", "codebook", "full_length_logits", "base_model"):
        config.pop(name, None)
    config |= {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"}
    (stock / "config.json").write_text(json.dumps(config))
    for shard in pruned.glob("*.safetensors"):  # stock vLLM 0.32 reads vision towers with one level more
        weights = {
            name.replace("vision_tower.", "vision_tower.vision_model.", 1): weight
            for name, weight in load_file(shard).items()
            if "codebook" not in name
        }
        save_file(weights, stock / shard.name, metadata={"format": "pt"})
    return {"stock": stock, "pruned": pruned}


class Server:
    """`vllm serve` on a free port of this machine, and what it says of itself."""

    def __init__(self, model: Path, log: Path, *options: str, **environment: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        address = f"--host 127.0.0.1 --port {port} --served-model-name rbl".split()
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("vllm"), "serve", str(model), *address, *options],
            env={**os.environ, **environment},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        self.log, self.client = log, OpenAI(base_url=f"{self.url}/v1", api_key="none")

    def wait(self, seconds: float = 900) -> None:
        until = time.monotonic() + seconds
        while True:
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"The server did not start: {self.log.read_text()[-3000:]}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            time.sleep(0.5)

    def metric(self, name: str, label: str | None = None) -> float:
        """A number of `/metrics`, or a label of one."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=10).read().decode()
        line = next(line for line in text.splitlines() if line.startswith(f"{name}{{"))
        return float(line.split(f'{label}="')[1].split('"')[0] if label else line.rsplit(" ", 1)[1])

    def ask(self, picture: str) -> tuple[float, int]:
        """Seconds to the first token, and tokens of the prompt."""
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": "What does this image show?"},
        ]
        start, first, prompt = time.perf_counter(), None, 0
        for part in self.client.chat.completions.create(
            model="rbl",
            messages=[{"role": "user", "content": content}],
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        ):
            if first is None and part.choices:
                first = time.perf_counter() - start
            prompt = part.usage.prompt_tokens if part.usage else prompt
        return first, prompt

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def round_of(server: Server, pictures: list[str]) -> dict:
    """All requests at once: requests per second, median time to first token, and the most KV-cache blocks in use."""
    most, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.05):
            most[0] = max(most[0], server.metric("vllm:kv_cache_usage_perc"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        with ThreadPoolExecutor(len(pictures)) as pool:
            answers = list(pool.map(server.ask, pictures))
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    return {
        "requests_per_second": len(pictures) / seconds,
        "first_token": statistics.median(first for first, _ in answers),
        "blocks": most[0] * server.metric("vllm:cache_config_info", "num_gpu_blocks"),
        "prompt": statistics.mean(prompt for _, prompt in answers),
    }


def picture(random: np.random.Generator) -> str:
    """A photo-sized image of coarse noise, as base64 PNG."""
    small = Image.fromarray(random.integers(0, 255, (42, 42, 3), dtype=np.uint8))
    file = io.BytesIO()
    small.resize((672, 672), Image.Resampling.NEAREST).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "small",
    device: Annotated[str, typer.Option(help="cpu or cuda; says how vLLM is started.")] = "cpu",
    keep_ratio: Annotated[float, typer.Option(help="Share of visual tokens that the pruned checkpoint keeps.")] = 0.15,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Of each server, after one that warms up.")] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
) -> None:
    """Serve a stock and a pruned checkpoint with vLLM and compare them."""
    random, found = np.random.default_rng(0), {"stock": [], "pruned": []}
    options = f"--max-model-len 4096 --max-num-seqs {concurrency} --no-enable-prefix-caching".split()
    options += "--mm-processor-cache-gb 0 --skip-mm-profiling".split()
    options += ["--gpu-memory-utilization", "0.45"] if device == "cuda" else ["--dtype", "float32", "--enforce-eager"]
    env = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")}
    with tempfile.TemporaryDirectory() as scratch:
        servers = {}
        try:
            for name, path in make_checkpoints(Path(scratch), preset, keep_ratio).items():
                servers[name] = Server(path, Path(scratch, f"{name}.log"), *options, **env)
                servers[name].wait()
            for number in range(rounds + 1):
                pictures = [picture(random) for _ in range(concurrency)]
                for name in ("stock", "pruned") if number % 2 else ("pruned", "stock"):
                    result = round_of(servers[name], pictures)
                    if number:
                        found[name].append(result)
        finally:
            for server in servers.values():
                server.stop()
    table = Table("", "stock", "pruned", "pruned / stock (median of rounds, 95%)")
    for name, label in (
        ("requests_per_second", "requests a second"),
        ("first_token", "time to first token, s"),
        ("blocks", "KV-cache blocks, most"),
        ("prompt", "prompt tokens"),
    ):
        values = {side: [result[name] for result in results] for side, results in found.items()}
        middle, low, high = ratio(values["pruned"], values["stock"])
        cells = [f"{statistics.median(values[side]):.2f}" for side in ("stock", "pruned")]
        table.add_row(label, *cells, f"{middle:.2f} [{low:.2f}, {high:.2f}]")
    Console().print(table)
    if out is not None:
        about = {
            "preset": preset,
            "device": device,
            "keep_ratio": keep_ratio,
            "concurrency": concurrency,
            "rounds": rounds,
            "max_tokens": MAX_TOKENS,
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "date": datetime.date.today().isoformat(),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"about": about, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
