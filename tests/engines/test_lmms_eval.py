"""The lmms-eval plugin, by the harness's own command. Runs in the environment of `make_environment.sh`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("lmms_eval.models.registry_v2", reason="needs lmms-eval: tests/engines/make_environment.sh")

from transformers import AutoProcessor

from conftest import make_family
from testbeds.files import write_questions
from transformers_rbl import PruningConfig, rbl_class
from transformers_rbl.evaluation.evaluate import evaluate
from transformers_rbl.evaluation.questions import read_questions
from transformers_rbl.integrations.lmms_eval import RBL, cut, manifest


ROOT = Path(__file__).parents[2]
MODEL = ROOT / "codebooks" / "digits-llava-next"
RATIO = 0.3
PRUNED = f"keep_ratio={RATIO}"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of the harness, made of the testbed's held-out set."""
    folder = tmp_path_factory.mktemp("task")
    write_questions(folder, "llava_next", 7, "test", 11, "digits")
    return folder


@pytest.fixture(scope="module")
def expected(task):
    """What `rbl evaluate` finds, unpruned and pruned: answers, accuracy, and the share of tokens, row ends counted."""
    model = rbl_class(MODEL).from_pretrained(MODEL, dtype=torch.float32).eval()
    results, _ = evaluate(
        model,
        AutoProcessor.from_pretrained(MODEL),
        read_questions(task / "questions.jsonl"),
        [PruningConfig(keep_ratio=RATIO)],
        ["exact"],
    )
    stay = [result.tokens / results[0].tokens for result in results]
    return [(result.answers, float(np.mean(result.correct["exact"])), share) for result, share in zip(results, stay)]


def harness(task, out, arguments, batch, processes=1):
    launch = [sys.executable, "-m"]
    if processes > 1:
        launch += ["accelerate.commands.launch", "--cpu", "--num_processes", str(processes), "-m"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *launch,
            "lmms_eval",
            "--model",
            "rbl",
            "--model_args",
            f"pretrained={MODEL},dtype=float32,{arguments}",
            "--tasks",
            "digits",
            "--include_path",
            task,
            "--batch_size",
            str(batch),
            "--device",
            "cpu",
            "--output_path",
            out,
            "--log_samples",
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    results = json.loads(next(out.rglob("*results.json")).read_text())
    lines = next(out.rglob("*samples_digits.jsonl")).read_text().splitlines()
    samples = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
    return results, [sample["filtered_resps"] for sample in samples], done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments, batch, processes",
    [("prune=False", 8, 1), (PRUNED, 1, 1), (PRUNED, 8, 1), (PRUNED, 8, 2)],
)
def test_the_harness_finds_what_rbl_evaluate_finds(task, expected, tmp_path, arguments, batch, processes):
    results, answers, log = harness(task, tmp_path, arguments, batch, processes)
    wanted, accuracy, share = expected["keep" in arguments]
    assert answers == wanted
    assert results["results"]["digits"]["exact,none"] == pytest.approx(accuracy)
    kept, whole = (results["throughput"][f"avg_visual_tokens{name}"] for name in ("_kept", ""))
    assert kept > 0 and kept / whole == pytest.approx(share, abs=0.01)
    assert "visual tokens of 28 images" in log and f"'keep_ratio': {RATIO if 'keep' in arguments else None}" in log


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    import av

    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    random = np.random.RandomState(0)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(6):
            frame = av.VideoFrame.from_ndarray(random.randint(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    """A OneVision model in the harness's class, and its family."""
    family = make_family("llava_onevision", tmp_path_factory.mktemp("onevision") / "made")
    folder = tmp_path_factory.mktemp("saved")
    family.pruned().save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return RBL(str(folder), device="cpu", batch_size=4, max_frames=4, max_new_tokens=5), family


def requests_for(lm, visuals, settings=None):
    """Requests as the harness makes them, each question with its own images or videos."""
    lm.task_dict = {"task": {"test": list(range(len(visuals)))}}
    own = (dict(settings or {}), lambda doc: visuals[doc])
    return [SimpleNamespace(args=(f"question {n}?", *own, n, "task", "test")) for n in range(len(visuals))]


def test_images_several_images_videos_and_text_share_a_batch(onevision, video):
    lm, family = onevision
    images = family.images(3)
    visuals = [[images[0]], [images[1], images[2]], [video], []]
    together = lm.generate_until(requests_for(lm, visuals))
    lm.batch_size = 1
    assert lm.generate_until(requests_for(lm, visuals)) == together
    lm.batch_size = 4
    inputs = lm._inputs(["question 0?"], [[images[0].convert("RGB")]])
    ids = lm.model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs.input_ids.shape[1] :]
    assert together[0] == lm.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_likelihoods_are_those_of_the_model(onevision):
    lm, family = onevision
    image = family.images(1)[0].convert("RGB")
    lm.task_dict = {"task": {"test": [0]}}
    requests = [
        SimpleNamespace(args=("what?", said, lambda doc: [image], 0, "task", "test")) for said in (" one", " two")
    ]
    found = lm.loglikelihood(requests)
    for (loss, _), said in zip(found, (" one", " two")):
        inputs = lm._inputs(["what?"], [[image]])
        ids = lm.processor.tokenizer(said, add_special_tokens=False, return_tensors="pt").input_ids
        length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        labels = inputs["input_ids"].clone()
        labels[:, :length] = -100
        with torch.no_grad():
            assert loss == pytest.approx(lm.model(**inputs, labels=labels).loss.item(), abs=1e-4)
    assert found[0][0] != found[1][0]


def test_settings_of_tasks_and_of_the_model(onevision, tmp_path):
    lm, _ = onevision
    settings, until = lm._generation({"until": "\n", "temperature": 0, "top_p": 0.9, "max_new_tokens": None})
    assert settings == {"max_new_tokens": 5, "do_sample": False} and until == ["\n"]
    settings, _ = lm._generation({"temperature": 0.7, "top_p": 0.9, "num_beams": 2})
    assert settings == {"max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_beams": 2}
    assert cut("a cat. It", [".", "It"]) == "a cat" and cut("a cat", []) == "a cat"
    assert manifest().model_id == "rbl"
    for arguments, words in (
        ({"keep_rato": 0.1}, "does not know keep_rato"),
        ({"prune": False, "keep_ratio": 0.1}, "would not be read"),
        ({"score": "diversity"}, "exactly one of keep_ratio"),
        ({"batch_size": "auto"}, "is a number"),
    ):
        with pytest.raises(ValueError, match=words):
            RBL(str(MODEL), device="cpu", **arguments)


def test_what_a_model_cannot_see_is_refused(video, onevision):
    lm = RBL(str(MODEL), device="cpu")
    with pytest.raises(ValueError, match="takes no video"):
        lm.generate_until(requests_for(lm, [[video]]))
    with pytest.raises(ValueError, match="images and paths of videos"):
        lm.generate_until(requests_for(lm, [[3]]))
    with pytest.raises(ValueError, match="mixes images and videos"):
        onevision[0].generate_until(requests_for(onevision[0], [[video, Image.new("RGB", (28, 28))]]))
    with pytest.raises(NotImplementedError, match="several rounds"):
        lm.generate_until_multi_round([])


def test_the_harness_has_every_task_of_the_script():
    from lmms_eval.tasks import TaskManager

    text = (ROOT / "scripts" / "reproduce_paper.sh").read_text()
    names = [name for line in re.findall(r"^(?:images|several|captions)=(.*)$", text, re.M) for name in line.split(",")]
    assert len(names) >= 11
    known = TaskManager().all_tasks
    assert [name for name in names if name not in known] == []
