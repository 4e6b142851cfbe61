"""What 0.1.0 wrote and named still works: a saved model, a codebook, records of a build, remote code, and every public
name. The folder was written by 0.1.0 itself (`fixtures/saved-by-0.1.0/README.md`)."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from transformers_rbl import LlavaNextForConditionalGenerationRBL, PruningConfig, RedundancyCodebook
from transformers_rbl.cli import app
from transformers_rbl.moved import MOVED


SAVED = Path(__file__).parent / "fixtures" / "saved-by-0.1.0"
EXPECTED = json.loads((SAVED / "expected.json").read_text())
# `Prober` is asked about what `building.showing.show` makes of an image, and encodes none itself: it serves any family.
GONE = {"transformers_rbl.building.probing.Prober.encode"}
NAMES = sorted(set((SAVED / "public-names.txt").read_text().split()) - GONE)
GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def model():
    return LlavaNextForConditionalGenerationRBL.from_pretrained(SAVED / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inputs():
    tensors = load_file(SAVED / "inputs.safetensors")
    return {**tensors, "pixel_values": tensors["pixel_values"].float()}


@torch.no_grad()
def test_a_saved_model_keeps_the_same_tokens_and_gives_the_same_logits(model, inputs):
    outputs = model(**inputs)
    assert [mask.int().tolist() for mask in outputs.keep_masks] == EXPECTED["keep_masks"]
    torch.testing.assert_close(outputs.logits[:, -1], torch.tensor(EXPECTED["last_logits"]), atol=2e-4, rtol=0)


def test_a_saved_model_gives_the_same_ids(model, inputs):
    assert model.generate(**inputs, **GREEDY).tolist() == EXPECTED["ids"]


def test_a_second_turn_on_the_cache_gives_the_same_ids(model, inputs):
    answer = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn = EXPECTED["second_turn"]
    ids, mask = torch.tensor(turn["input_ids"]), torch.tensor(turn["attention_mask"])
    again = model.generate(ids, attention_mask=mask, past_key_values=answer.past_key_values, **GREEDY)
    assert again.tolist() == turn["ids"]


@pytest.mark.parametrize("case", EXPECTED["settings"], ids=lambda case: "-".join(map(str, case["pruning"].values())))
def test_settings_of_a_call_mean_the_same(model, inputs, case):
    ids = model.generate(**inputs, **GREEDY, pruning=PruningConfig(**case["pruning"]))
    assert ids.tolist() == case["ids"]


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModel])
def test_auto_classes_load_it(model, auto):
    loaded = auto.from_pretrained(SAVED / "model", dtype=torch.float32)
    part = model if auto is AutoModelForImageTextToText else model.model
    assert type(loaded) is type(part)
    state = part.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_its_processor_writes_the_same_prompt(inputs):
    random = np.random.RandomState(0)
    images = [Image.fromarray(random.randint(0, 255, (*size, 3), dtype=np.uint8)) for size in ((50, 56), (30, 88))]
    processor = AutoProcessor.from_pretrained(SAVED / "model")
    made = processor(images=images, text=EXPECTED["texts"], padding=True, return_tensors="pt")
    assert torch.equal(made["input_ids"], inputs["input_ids"])
    assert torch.equal(made["attention_mask"], inputs["attention_mask"])
    assert torch.equal(made["pixel_values"].half().float(), inputs["pixel_values"])


def test_codebooks_are_bit_for_bit_the_same(model):
    stored = load_file(SAVED / "codebook" / "codebook.safetensors")["prototypes"]
    book = RedundancyCodebook.from_pretrained(SAVED / "codebook")
    assert torch.equal(book.prototypes, stored) and torch.equal(model.codebook.prototypes, stored)
    assert book.prototypes.dtype == model.codebook.prototypes.dtype == torch.float32
    for known in (book, model.codebook):
        assert known.base_model == "org/tiny" and known.recommended_keep_ratio == 0.3
        assert known.built_with == {"images": {"n": 4}}
    assert model.pruning.keep_ratio == 0.3


def test_a_pickled_codebook_finds_its_class_under_the_old_name():
    content = (SAVED / "codebook.pickle").read_bytes()
    assert b"transformers_rbl.codebook" in content
    book = pickle.loads(content)
    assert type(book) is RedundancyCodebook
    assert torch.equal(book.prototypes, RedundancyCodebook.from_pretrained(SAVED / "codebook").prototypes)


def test_records_of_a_build_select_the_same_codebook(tmp_path):
    build = shutil.copytree(SAVED / "build", tmp_path / "build")
    done = CliRunner().invoke(app, ["build", "--from-records", str(build), "--out", str(tmp_path / "again")])
    assert done.exit_code == 0, done.output
    for name in ("codebook.safetensors", "provenance.csv", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (build / name).read_bytes(), name


REMOTE = """
import importlib.abc, json, sys
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers_rbl":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
folder, tensors = sys.argv[1:]
inputs = load_file(tensors)
inputs["pixel_values"] = inputs["pixel_values"].float()
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
ids = model.generate(**inputs, do_sample=False, max_new_tokens=8).tolist()
print("RESULT " + json.dumps([ids, type(model).__module__]))
"""


def test_remote_code_of_0_1_0_runs_by_itself(tmp_path):
    """One turn: on transformers 5.24 that code does not know the new name of the cache."""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", REMOTE, str(SAVED / "model"), str(SAVED / "inputs.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout + done.stderr
    ids, module = json.loads(lines[0].removeprefix("RESULT "))
    assert ids == EXPECTED["ids"] and module.startswith("transformers_modules.")


def resolve(name: str):
    """The object that a dotted name stands for: as many parts as import, then attributes."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        try:
            value = import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not (error.name and name.startswith(error.name)):
                raise
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_of_0_1_0_is_where_it_was(name):
    assert resolve(name) is not None


def test_a_name_that_never_was_is_missing():
    with pytest.raises(ImportError, match="nothing"):
        from transformers_rbl.pruning import nothing  # noqa: F401
    with pytest.raises(AttributeError, match="nothing"):
        resolve("transformers_rbl.hub.nothing")


@pytest.mark.parametrize("old", MOVED)
def test_every_place_in_the_table_exists(old):
    assert all(import_module(f"transformers_rbl.{place}") for place in MOVED[old])


def test_aliases_import_nothing_before_they_are_asked():
    code = (
        "import sys, transformers_rbl, transformers_rbl.publish; print('transformers_rbl.hub.publish' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip().splitlines()[-1] == "False"
