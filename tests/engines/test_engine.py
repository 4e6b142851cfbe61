"""vLLM against transformers: the same checkpoint, the same ids. Runs in the environment of `make_environment.sh`."""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


pytest.importorskip("vllm", reason="needs vLLM: tests/engines/make_environment.sh makes an environment with it")

from engine import video_metadata
from engine_families import NATIVE, SERVED, engine_family, image_part

from benchmark_serving import Server
from conftest import CLASSES
from testbeds.digits.questions import examples
from transformers_rbl import PruningConfig, rbl_class


ROOT = Path(__file__).parents[2]
ENGINE = Path(__file__).with_name("engine.py")
SIZES = [(28, 28), (50, 56), (30, 88), (90, 31)]
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def all_served(tmp_path_factory):
    """Checkpoints by family, each made when it is first asked for."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = Served(name, tmp_path_factory.mktemp(name))
        return made[name]

    return of


@pytest.fixture(params=SERVED)
def served(request, all_served):
    return all_served(request.param)


@pytest.fixture(params=["llava_next", *NATIVE])
def one_of_a_kind(request, all_served):
    """A family of tiles with row ends, and those of native resolution and of tiles in one run."""
    return all_served(request.param)


@pytest.fixture
def next_served(all_served):
    return all_served("llava_next")


class Served:
    """A family's checkpoint as our class saves it, the stock one as vLLM's own class reads it, and images."""

    def __init__(self, name, folder):
        self.family = engine_family(name, folder / "made")
        self.model = self.family.pruned(keep_ratio=0.2)
        self.folder, self.stock, self.scratch = folder / "pruned", folder / "stock", folder
        self.model.save_pretrained(self.folder)
        self.family.processor.save_pretrained(self.folder)
        old_layout(self.family.folder, self.stock)
        random = np.random.RandomState(0)
        self.images, self.encoded = [], []
        for number, size in enumerate(SIZES):
            path = folder / f"{number}.png"
            Image.fromarray(random.randint(0, 255, (*size, 3), dtype=np.uint8)).save(path)
            self.images.append(str(path))
        self.video = str(folder / "video.npy")
        np.save(self.video, random.randint(0, 255, (4, 48, 80, 3), dtype=np.uint8))

    def batch(self, **more) -> list[dict]:
        """Six prompts: an image each of four sizes, two images, none."""
        image = image_part(self.family.name)
        one = [
            {"prompt": f"<s>USER: {image}What {word}? ASSISTANT:", "images": [path], **more}
            for word, path in zip(("is it", "colour has it", "moves", "now"), self.images)
        ]
        image = image.removesuffix("\n")
        two = {
            "prompt": f"<s>USER: look at {image} and at {image}, then say what both of them show. ASSISTANT:",
            "images": self.images[1:3],
            **more,
        }
        return [*one, two, {"prompt": "<s>USER: no picture here. ASSISTANT:"}]

    @torch.no_grad()
    def expected(self, request: dict, keep_ratio: float, **settings) -> list[int]:
        images = [Image.open(path).convert("RGB") for path in request.get("images", ())]
        visual = {"images": images or None}
        if "video" in request:
            frames = np.load(request["video"])
            said = {name: value for name, value in video_metadata(len(frames)).items() if name != "do_sample_frames"}
            visual = {"videos": [frames], "video_metadata": [said], "do_sample_frames": False}
        inputs = self.family.processor(**visual, text=[request["prompt"]], return_tensors="pt")
        out = self.model.generate(
            **inputs,
            pruning=PruningConfig(keep_ratio=keep_ratio, **settings),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
        )
        return out[0, inputs.input_ids.shape[1] :].tolist()

    def run(self, rounds, model=None, processes=False, expect_failure=False, **job):
        path, out = self.scratch / "job.json", self.scratch / "out.json"
        path.write_text(json.dumps({"model": str(model or self.folder), "rounds": rounds, **job}))
        out.unlink(missing_ok=True)
        env = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))}
        done = subprocess.run(
            [sys.executable, ENGINE, path, out], env=env, capture_output=True, text=True, timeout=1200
        )
        if expect_failure and not out.exists():
            return done.stdout + done.stderr
        assert out.exists(), done.stdout[-3000:] + done.stderr[-6000:]
        found = json.loads(out.read_text())
        self.encoded = found["encoded"]
        return found["rounds"]


def old_layout(source, target) -> None:
    """A stock checkpoint as stock vLLM 0.32 reads it: transformers 5 writes LLaVA's vision towers one level higher."""
    shutil.copytree(source, target)
    if json.loads((target / "config.json").read_text())["model_type"] not in CLASSES:
        return
    weights = load_file(target / "model.safetensors")
    weights = {name.replace("vision_tower.", "vision_tower.vision_model.", 1): w for name, w in weights.items()}
    (target / "model.safetensors").unlink()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def test_greedy_ids_are_those_of_transformers(served):
    """At 20% and, asked per request, 10%; alone and in batches; prefix cache cold and warm; prefill in chunks (the
    longest prompts have more than 64 tokens). An image that was encoded is not encoded again for another prompt; at
    another ratio it is another image, for the encoder cache and for the prefix cache."""
    batch = served.batch()
    tight = [{**request, "keep_ratio": 0.1} for request in batch[:5]]
    other = {**batch[3], "prompt": batch[3]["prompt"].replace("now", "else")}
    alone = [[request] for request in batch]
    across = served.family.name == "llava_next"  # in processes of its own, where nothing can be counted
    rounds = served.run(
        [batch, batch, tight, [batch[3]], [other], [{**batch[3], "keep_ratio": 0.1}], *alone],
        processes=across,
        engine={"max_num_batched_tokens": 64, "enable_prefix_caching": True, "block_size": 32},
    )
    wanted = [served.expected(request, 0.2) for request in batch]
    assert len({tuple(ids) for ids in wanted}) >= 5, "the answers hardly depend on the images"
    for found in (rounds[0], rounds[1], [one[0] for one in rounds[6:]]):
        assert [answer["ids"] for answer in found] == wanted
    assert [answer["ids"] for answer in rounds[2]] == [served.expected(request, 0.1) for request in tight]
    assert rounds[4][0]["ids"] == served.expected(other, 0.2)
    assert rounds[5][0]["ids"] == rounds[2][3]["ids"]
    assert all(few["prompt"] < more["prompt"] for few, more in zip(rounds[2][1:4], rounds[0][1:4]))
    assert max(answer["prompt"] for answer in rounds[0]) > 64
    assert rounds[1][4]["cached"] >= 64  # of the longest prompt, both images among them
    if not across:
        assert served.encoded[0] >= 4 and served.encoded[3:6] == [0, 0, 0]
        assert served.encoded[2] >= 4, "at another ratio, the image of the first was taken"


def equal_but_for_ties(answer: dict, wanted: list[int]) -> bool:
    """Whether an answer is the wanted one up to where its two next tokens are equally likely, to 1e-3."""
    step = next((step for step, (a, b) in enumerate(zip(answer["ids"], wanted)) if a != b), None)
    if step is None:
        return answer["ids"] == wanted
    likely = answer["logprobs"][step]
    return abs(likely[str(answer["ids"][step])] - likely.get(str(wanted[step]), float("inf"))) < 1e-3


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
def test_merged_tokens_are_those_of_transformers(all_served, name):
    """Row ends and deepstack features beside them."""
    served, rule = all_served(name), {"keep_ratio": 0.2, "merge": "nearest"}
    batch = served.batch()[1:]  # the first image's one tile is its base image: dropped tokens have two nearest ones
    found = served.run([batch], engine={"hf_overrides": {"pruning": rule}}, logprobs=5)[0]
    for request, answer in zip(batch, found, strict=True):
        assert equal_but_for_ties(answer, served.expected(request, **rule))
    assert any(answer["ids"] != served.expected(request, 0.2) for request, answer in zip(batch, found))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_video_is_answered_as_in_transformers(all_served, name):
    served, video = all_served(name), "<|vision_start|><|video_pad|><|vision_end|>"
    asked = {"prompt": f"<s>USER: {video}What moves? ASSISTANT:", "video": served.video}
    both = [asked, {**asked, "keep_ratio": 0.1}, served.batch()[0]]
    found = served.run([both], engine={"limit_mm_per_prompt": {"image": 2, "video": 1}})[0]
    assert [answer["ids"] for answer in found] == [served.expected(one, r) for one, r in zip(both, (0.2, 0.1, 0.2))]
    assert found[1]["prompt"] < found[0]["prompt"]


def test_videos_that_vllm_would_normalise_as_images_are_refused(all_served):
    """By the numbers of the image processor, where the video processor has others."""
    served = all_served("qwen3_vl")
    folder = served.scratch / "other numbers"
    shutil.copytree(served.folder, folder)
    config = json.loads((folder / "processor_config.json").read_text())
    config["video_processor"]["image_mean"] = [0.4, 0.5, 0.5]
    (folder / "processor_config.json").write_text(json.dumps(config))
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    asked = {"prompt": f"<s>USER: {video}What moves? ASSISTANT:", "video": served.video}
    refused, answered = served.run([[asked], served.batch()[:1]], model=folder)
    assert "video" in refused["error"] and answered[0]["ids"] == served.expected(served.batch()[0], 0.2)


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_video_is_refused_where_it_cannot_be_served(all_served, name):
    served = all_served(name)
    asked = {"prompt": "<s>USER: <video>\nWhat moves? ASSISTANT:", "video": served.video}
    good = served.batch()[:1]
    refused, answered = served.run([[asked], good])
    assert "video" in refused["error"] and answered[0]["ids"] == served.expected(good[0], 0.2)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_positions_decide_the_answers(all_served, name):
    """So that the plugin's positions reach the language model: without rows and columns the next token's probabilities
    are others, but for a prompt without images."""
    served = all_served(name)
    right = served.run([served.batch()], logprobs=5)[0]
    wrong = served.run([served.batch()], mutation="positions without rows and columns", logprobs=5)[0]
    likeliest = [[answer["logprobs"][0][str(answer["ids"][0])] for answer in side] for side in (right, wrong)]
    different = [abs(a - b) > 1e-4 for a, b in zip(*likeliest, strict=True)]
    assert sum(different) >= 3 and not different[-1]  # of the smallest image too little stays to lie anywhere


def test_keeping_all_gives_the_log_probabilities_of_stock_vllm(served):
    batch = served.batch()
    ours = served.run([batch], engine={"hf_overrides": {"pruning": {"keep_ratio": 1.0}}}, logprobs=5)[0]
    stock = served.run([batch], model=served.stock, logprobs=5)[0]
    for a, b in zip(ours, stock, strict=True):
        assert (a["ids"], a["prompt"]) == (b["ids"], b["prompt"])
        for left, right in zip(a["logprobs"], b["logprobs"], strict=True):
            assert left.keys() == right.keys()
            assert max(abs(left[token] - right[token]) for token in left) < 1e-4


def test_other_settings_and_half_precision(next_served):
    """Base image only, one row end; and a model in bfloat16, whose codebook stays float32."""
    pruning = {"keep_ratio": 0.4, "tiles": "base", "newlines": "last"}
    batch = next_served.batch()
    found = next_served.run([batch], engine={"hf_overrides": {"pruning": pruning}})[0]
    model = next_served.family.pruned(keep_ratio=None, pruning=pruning)
    for request, answer in zip(batch, found):
        images = [Image.open(path).convert("RGB") for path in request.get("images", ())]
        inputs = next_served.family.processor(images=images or None, text=[request["prompt"]], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
        assert answer["ids"] == out[0, inputs.input_ids.shape[1] :].tolist()
    half = next_served.run([batch], engine={"dtype": "bfloat16"})[0]
    assert [a["prompt"] for a in half] == [a["prompt"] for a in next_served.run([batch])[0]]


def test_tokens_chosen_outside_come_as_embeddings_of_any_length(next_served):
    """What a threshold keeps: pruning is off in the engine, lengths differ within a batch."""
    rule, requests, wanted = PruningConfig(threshold=0.05), [], []
    for number, path in enumerate(next_served.images):
        inputs = next_served.family.processor(images=[Image.open(path)], text=["<image>"], return_tensors="pt")
        features = next_served.model.get_image_features(
            pixel_values=inputs.pixel_values, image_sizes=inputs.image_sizes, pruning=rule, return_dict=True
        )
        embeds = next_served.scratch / f"{number}.pt"
        torch.save(features.pooler_output[0].detach(), embeds)
        prompt = "<s>USER: <image>\nWhat is it? ASSISTANT:"
        requests.append({"prompt": prompt, "embeds": [str(embeds)]})
        whole = next_served.family.processor(images=[Image.open(path)], text=[prompt], return_tensors="pt")
        out = next_served.model.generate(
            **whole, pruning=rule, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None
        )
        wanted.append(out[0, whole.input_ids.shape[1] :].tolist())
    lengths = [len(torch.load(request["embeds"][0])) for request in requests]
    assert len(set(lengths)) > 1
    wide = next_served.scratch / "wide.pt"
    torch.save(torch.randn(5, 64), wide)
    off = {"hf_overrides": {"pruning": {"enabled": False}}, "enable_mm_embeds": True}
    found, refused, again = next_served.run(
        [requests, [{"prompt": requests[0]["prompt"], "embeds": [str(wide)]}], requests[:1]], engine=off
    )
    assert [answer["ids"] for answer in found] == wanted
    assert "dimension mismatch" in refused["error"] and again[0]["ids"] == wanted[0]


@pytest.mark.parametrize("mutation", ["too many", "too few", "another ratio in the processor"])
def test_features_that_do_not_fit_their_placeholders_end_in_an_error(one_of_a_kind, mutation):
    result = one_of_a_kind.run([one_of_a_kind.batch()[1:2]], mutation=mutation, expect_failure=True)
    assert "placeholders" in (result[0]["error"] if isinstance(result, list) else result)


def broken(served, change) -> Path:
    folder = served.scratch / "broken"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(served.folder, folder)
    weights, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    change(weights, config)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_prototypes(weights, config):
    del weights["model.codebook.prototypes"]


def of_another_width(weights, config):
    weights["model.codebook.prototypes"] = torch.randn(7, 64)


def without_codebook(weights, config):
    without_prototypes(weights, config)
    config["num_prototypes"] = config["codebook"] = None


def with_a_threshold(weights, config):
    config["pruning"] = {"threshold": 0.5}


@pytest.mark.parametrize(
    "change, words",
    [
        (without_prototypes, "hold no prototypes"),
        (of_another_width, "prototypes are \\(7, 64\\)"),
        (without_codebook, "holds no codebook"),
        (with_a_threshold, "rbl calibrate"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_refused_at_start(next_served, change, words):
    result = next_served.run([next_served.batch()[:1]], model=broken(next_served, change), expect_failure=True)
    assert isinstance(result, str)
    assert re.search(words, result), result[-3000:]


def test_bad_requests_are_refused_and_the_engine_goes_on(next_served):
    good = next_served.batch()[:1]
    rounds = next_served.run(
        [
            [{**good[0], "keep_ratio": 0.5}],
            [{**good[0], "keep_ratio": 0}],
            [{**good[0], "images": next_served.images[2:]}],  # not good's own: stock vLLM then asks for a retry
            good,
        ]
    )
    assert "reserved memory" in rounds[0]["error"]
    assert "in (0, 1]" in rounds[1]["error"]
    assert "error" in rounds[2]
    assert rounds[3][0]["ids"] == next_served.expected(good[0], 0.2)


@contextlib.contextmanager
def serving(served, *options, **environment):
    """`vllm serve`: its url, and how to ask question `number` of one of four images: ids, and tokens of the prompt."""

    def ask(number, **extra):
        picture = base64.b64encode(Path(served.images[number % 4]).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            {"type": "text", "text": f"What is it, {number}?"},
        ]
        reply = server.client.chat.completions.create(
            model="rbl",
            messages=[{"role": "user", "content": content}],
            max_tokens=8,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True, **extra},
        )
        return reply.choices[0].token_ids, reply.usage.prompt_tokens

    common = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]
    server = Server(served.folder, served.scratch / "serve.log", *common, *options, **ENVIRONMENT, **environment)
    try:
        server.wait(300)
        yield server.url, ask
    finally:
        server.stop()


def asked(served, number) -> dict:
    """The same question as `serving` asks, for transformers."""
    prompt = f"<s>USER: <image>\nWhat is it, {number}? ASSISTANT:"
    return {"prompt": prompt, "images": [served.images[number % 4]]}


def test_concurrent_requests_to_a_server_equal_requests_one_by_one(next_served):
    with serving(next_served, "--trust-request-mm-kwargs") as (_, ask):
        alone = [ask(number) for number in range(8)]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(8))) == alone
        fewer = ask(1, mm_processor_kwargs={"keep_ratio": 0.1})
        assert fewer[1] < alone[1][1]
        assert alone[1][0] == next_served.expected(asked(next_served, 1), 0.2)
        assert fewer[0] == next_served.expected(asked(next_served, 1), 0.1)
        with pytest.raises(Exception, match="reserved memory"):
            ask(1, mm_processor_kwargs={"keep_ratio": 0.9})
        assert ask(2) == alone[2]


@pytest.mark.parametrize("switch, engines", [("--tensor-parallel-size", {"0"}), ("--data-parallel-size", {"0", "1"})])
def test_two_ranks_and_two_engines_answer_as_one(next_served, switch, engines):
    """One model over two processes, and two engines behind one address, of which each gets requests."""
    processes = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with serving(next_served, switch, "2", **processes) as (url, ask):
        with ThreadPoolExecutor(8) as pool:
            found = [ids for ids, _ in pool.map(ask, range(8))]
        metrics = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    assert set(re.findall(r'vllm:prompt_tokens_total\{engine="(\d)".* [1-9]', metrics)) == engines
    assert found == [next_served.expected(asked(next_served, number), 0.2) for number in range(8)]


def test_the_committed_testbed_answers_as_in_transformers(tmp_path):
    folder = ROOT / "codebooks" / "digits-llava-next"
    model = rbl_class(folder).from_pretrained(folder, dtype=torch.float32).eval()
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    requests, wanted, right = [], [], []
    for number, example in enumerate(examples("llava_next", "image", "test", 12, 7)):
        path = tmp_path / f"{number}.png"
        example.pictures()[0].save(path)
        for _, question, reply in example.questions:
            prompt = f"<s>USER: <image> {question} ASSISTANT:"
            requests.append({"prompt": prompt, "images": [str(path)]})
            inputs = processor(images=[Image.open(path)], text=[prompt], return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None)
            wanted.append(out[0, inputs.input_ids.shape[1] :].tolist())
            right.append([*processor.tokenizer(reply).input_ids, processor.tokenizer.eos_token_id])
    job, out = tmp_path / "job.json", tmp_path / "out.json"
    job.write_text(json.dumps({"model": str(folder), "rounds": [requests], "max_tokens": 5}))
    env = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    subprocess.run([sys.executable, ENGINE, job, out], env=env, check=True, capture_output=True, timeout=400)
    found = [answer["ids"] for answer in json.loads(out.read_text())["rounds"][0]]
    assert found == wanted
    share = np.mean([ids[: len(answer)] == answer for ids, answer in zip(found, right, strict=True)])
    assert share > 0.6
