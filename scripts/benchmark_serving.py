"""vLLM with a pruned checkpoint and with the stock one it was made from, side by side at several loads: requests and
tokens a second, time to first token, KV cache, and what of the answers is right.

All servers run at once and are asked in turn, so that what else the machine does meets all of them. Every request has
an image of its own; prefix and image caches are off.

    python scripts/benchmark_serving.py                             # a trained testbed, this CPU
    python scripts/benchmark_serving.py --preset small              # 8 layers of width 512, random weights: no accuracy
    python scripts/benchmark_serving.py --preset 7b --device cuda   # the shape of the 7B model, bf16
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import io
import itertools
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from openai import OpenAI
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import tiny_checkpoint
from benchmark_prefill import PRESETS, build_model
from testbeds.answering import frame_of
from testbeds.digits.questions import examples
from transformers_rbl import PruningConfig, rbl_class


TESTBED = Path(__file__).parents[1] / "codebooks" / "digits-llava-next"


@dataclass(frozen=True)
class Asked:
    """An image as base64 PNG, a question, and the right reply where one is known."""

    picture: str
    question: str
    reply: str | None = None

    def resized(self, share: float) -> Asked:
        """The image at this share of its pixels, and the same question."""
        image = Image.open(io.BytesIO(base64.b64decode(self.picture)))
        size = [max(1, round(side * share**0.5)) for side in image.size]
        return Asked(as_png(image.resize(size, Image.Resampling.BICUBIC)), self.question, self.reply)


@dataclass(frozen=True)
class Answer:
    """Seconds to the first token, tokens of prompt and answer, and whether it is right."""

    first: float
    prompt: int
    said: int
    right: bool | None


@dataclass(frozen=True)
class Arm:
    """A server to compare: a checkpoint, settings in place of its own, and how its images are sent."""

    name: str
    checkpoint: Path
    pruning: dict[str, Any] | None = None
    share_of_pixels: float = 1.0

    def options(self) -> list[str]:
        return [] if self.pruning is None else ["--hf-overrides", json.dumps({"pruning": self.pruning})]


def arms_of(checkpoint: Path, stock: Path, keep_ratio: float) -> list[Arm]:
    """Stock, the codebook, and what costs the language model as little: tokens drawn by lot, and smaller images."""
    return [
        Arm("stock", stock),
        Arm("codebook", checkpoint, {"keep_ratio": keep_ratio}),
        Arm("random", checkpoint, {"keep_ratio": keep_ratio, "score": "random"}),
        Arm("resized", stock, share_of_pixels=keep_ratio),
    ]


def as_stock(pruned: Path, stock: Path) -> Path:
    """The same weights as a stock checkpoint that stock vLLM reads."""
    shutil.copytree(pruned, stock)
    config = json.loads((pruned / "config.json").read_text())
    for name in ("pruning", "num_prototypes", "codebook", "full_length_logits", "base_model", "auto_map"):
        config.pop(name, None)
    config["model_type"] = config["model_type"].removesuffix("_rbl")
    config["architectures"] = [rbl_class(pruned).stock.__name__]
    (stock / "config.json").write_text(json.dumps(config))
    (stock / "model.safetensors.index.json").unlink(missing_ok=True)  # names the codebook's weights too
    for shard in stock.glob("*.safetensors"):  # stock vLLM 0.32 reads LLaVA's vision towers with one level more
        weights = {
            name.replace("vision_tower.", "vision_tower.vision_model.", 1): weight
            for name, weight in load_file(shard).items()
            if "codebook" not in name
        }
        shard.unlink()
        save_file(weights, shard, metadata={"format": "pt"})
    return stock


def random_checkpoint(folder: Path, preset: str) -> Path:
    """A LLaVA-NeXT with random weights as our class saves it."""
    model = build_model("llava_next", preset, "cpu")
    model.pruning = PruningConfig(keep_ratio=1.0)
    model.save_pretrained(folder)
    tiny_checkpoint.processor(model.config).save_pretrained(folder)
    return folder


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

    def ask(self, asked: Asked, max_tokens: int) -> Answer:
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{asked.picture}"}},
            {"type": "text", "text": asked.question},
        ]
        start, first, text, usage = time.perf_counter(), 0.0, "", None
        for part in self.client.chat.completions.create(
            model="rbl",
            messages=[{"role": "user", "content": content}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": asked.reply is None},
        ):
            for choice in part.choices:
                first = first or time.perf_counter() - start
                text += choice.delta.content or ""
            usage = part.usage or usage
        right = None if asked.reply is None else text.split() == asked.reply.split()
        return Answer(first, usage.prompt_tokens, usage.completion_tokens, right)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def round_of(server: Server, asked: list[Asked], concurrency: int, max_tokens: int) -> dict[str, Any]:
    """Ask everything, `concurrency` at a time: seconds, answers, and the most KV-cache blocks in use."""
    most, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.05):
            most[0] = max(most[0], server.metric("vllm:kv_cache_usage_perc"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda one: server.ask(one, max_tokens), asked))
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    blocks = most[0] * server.metric("vllm:cache_config_info", "num_gpu_blocks")
    return {"seconds": seconds, "blocks": blocks, "answers": answers}


def measure(
    servers: dict[str, Server], asked: dict[str, list[Asked]], loads: list[int], rounds: int, max_tokens: int
) -> list[dict]:
    """One row per server and load, over all rounds. In each, a load's questions go to every server in turn."""
    found: dict[tuple[str, int], list[dict]] = {}
    for name, server in servers.items():
        round_of(server, asked[name][:4], 4, max_tokens)  # warms up
    order = list(servers)
    for number, load in itertools.product(range(rounds), loads):
        order = order[1:] + order[:1]
        for name in order:
            part = asked[name][number::rounds]
            found.setdefault((name, load), []).append(round_of(servers[name], part, load, max_tokens))
    return [summary(name, load, results) for (name, load), results in sorted(found.items())]


def summary(name: str, load: int, rounds: list[dict]) -> dict[str, Any]:
    """What a server did under one load. Rates are medians of rounds."""
    answers = [answer for result in rounds for answer in result["answers"]]
    first = [answer.first for answer in answers]
    rates = [len(result["answers"]) / result["seconds"] for result in rounds]
    said = [sum(answer.said for answer in result["answers"]) / result["seconds"] for result in rounds]
    right = [answer.right for answer in answers if answer.right is not None]
    return {
        "server": name,
        "concurrency": load,
        "requests": len(answers),
        "requests_per_second": float(np.median(rates)),
        "tokens_per_second": float(np.median(said)),
        "first_token_p50": float(np.percentile(first, 50)),
        "first_token_p99": float(np.percentile(first, 99)),
        "blocks": max(result["blocks"] for result in rounds),
        "prompt": float(np.mean([answer.prompt for answer in answers])),
        "right": sum(right) if right else None,
    }


def goodput(rows: list[dict], limit: float) -> dict[str, float]:
    """Per server, the most requests a second among the loads at which 99% see a first token within `limit` seconds;
    0 where there is no such load."""
    found = {row["server"]: 0.0 for row in rows}
    for row in rows:
        if row["first_token_p99"] <= limit:
            found[row["server"]] = max(found[row["server"]], row["requests_per_second"])
    return found


def as_png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def noise() -> Iterator[Asked]:
    """Photo-sized images of coarse noise, and a question without an answer."""
    random = np.random.default_rng(0)
    while True:
        small = Image.fromarray(random.integers(0, 255, (42, 42, 3), dtype=np.uint8))
        yield Asked(as_png(small.resize((672, 672), Image.Resampling.NEAREST)), "What does this image show?")


def testbed_questions(checkpoint: Path) -> Iterator[Asked]:
    """Of the held-out set, each of an image of its own, the kinds of questions in turn.

    Raises:
        ValueError: if the checkpoint's chat template does not make the prompts that it was trained with.
    """
    family = json.loads((checkpoint / "config.json").read_text())["model_type"].removesuffix("_rbl")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for number, example in enumerate(examples(family, "image", "test", 10**6, 2026)):
        _, question, reply = example.questions[number % len(example.questions)]
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        prompts = [chat, frame_of(family).prompt(example, question)]
        ids = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
        if ids[0] != ids[1]:
            raise ValueError(f"{checkpoint}: the chat template says {chat!r}, training said {prompts[1]!r}.")
        yield Asked(as_png(example.pictures()[0]), question, reply)


def show(rows: list[dict], limit: float) -> None:
    table = Table("", "at once", "requests/s", "tokens/s", "first token p50, s", "p99, s", "blocks", "prompt", "right")
    for row in rows:
        times = [f"{row[name]:.3f}" for name in ("first_token_p50", "first_token_p99")]
        rates = [f"{row[name]:.2f}" for name in ("requests_per_second", "tokens_per_second")]
        right = "" if row["right"] is None else f"{row['right'] / row['requests']:.1%}"
        counts = [f"{row[name]:.0f}" for name in ("blocks", "prompt")]
        table.add_row(row["server"], str(row["concurrency"]), *rates, *times, *counts, right)
    Console().print(table)
    for name, rate in goodput(rows, limit).items():
        Console().print(f"{name}: {rate:.2f} requests a second with 99% of first tokens within {limit:g} s")


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy against requests a second, a line through the loads of each server."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["server"] for row in rows):
        own = [row for row in rows if row["server"] == name]
        share = [100 * row["right"] / row["requests"] for row in own]
        axes.plot([row["requests_per_second"] for row in own], share, marker="o", label=name)
        for row, height in zip(own, share):
            place = (row["requests_per_second"], height)
            axes.annotate(str(row["concurrency"]), place, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel="requests a second (numbers: requests at once)", ylabel="right answers, %", ylim=(0, 100))
    axes.legend()
    figure.savefig(path, dpi=120)


def main(
    testbed: Annotated[Path, typer.Option(help="A trained checkpoint of the digits testbed.")] = TESTBED,
    preset: Annotated[str | None, typer.Option(help=f"Random weights instead: {', '.join(PRESETS)}.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; says how vLLM is started.")] = "cpu",
    keep_ratio: Annotated[float, typer.Option(help="Share of visual tokens, or of pixels, that stays.")] = 0.15,
    concurrency: Annotated[list[int] | None, typer.Option(help="Requests at once; default 1, 8, 32, 64.")] = None,
    requests: Annotated[int, typer.Option(min=4, help="Of each server at each load, over all rounds.")] = 192,
    rounds: Annotated[int, typer.Option(min=1, help="Of all servers and loads, after one that warms up.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 16,
    p99_limit: Annotated[float, typer.Option(help="Seconds in which 99% see a first token, for goodput.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="JSON to write; a plot beside it where replies are known.")] = None,
) -> None:
    """Serve a checkpoint with vLLM in four ways and compare them."""
    loads = sorted(concurrency or [1, 8, 32, 64])
    options = f"--max-model-len 4096 --max-num-seqs {max(loads)} --no-enable-prefix-caching".split()
    options += "--mm-processor-cache-gb 0 --skip-mm-profiling".split()
    options += ["--gpu-memory-utilization", "0.2"] if device == "cuda" else ["--dtype", "float32", "--enforce-eager"]
    env = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    questions = testbed_questions(testbed) if preset is None else noise()
    asked = list(itertools.islice(questions, requests))
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        checkpoint = testbed if preset is None else random_checkpoint(Path(scratch, "pruned"), preset)
        arms = arms_of(checkpoint, as_stock(checkpoint, Path(scratch, "stock")), keep_ratio)
        servers = {}
        for arm in arms:
            if arm.name == "resized":  # stock's server, smaller images
                servers[arm.name] = servers["stock"]
                continue
            log = Path(scratch, f"{arm.name}.log")
            servers[arm.name] = Server(arm.checkpoint, log, *options, *arm.options(), **env)
            stack.callback(servers[arm.name].stop)
            if device == "cuda":  # each looks at how much memory is free
                servers[arm.name].wait()
        for server in servers.values():
            server.wait(1800)
        sent = {arm.name: [one.resized(arm.share_of_pixels) for one in asked] for arm in arms}
        rows = measure(servers, sent, loads, rounds, max_tokens)
    show(rows, p99_limit)
    if out is not None:
        about = {
            "checkpoint": preset or testbed.name,
            "device": device,
            "keep_ratio": keep_ratio,
            "rounds": rounds,
            "max_tokens": max_tokens,
            "p99_limit": p99_limit,
            "goodput": goodput(rows, p99_limit),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "date": datetime.date.today().isoformat(),
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")
        if preset is None:
            plot(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
