"""Files of every family: keys, save and load, Auto classes, pickles, imports, remote code; budgets, LoRA, deepstack."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.conversion_mapping import get_model_conversion_mapping

import transformers_rbl
from transformers_rbl.models.auto_rbl import family_class, rbl_class
from transformers_rbl.models.families import FAMILIES
from transformers_rbl.models.seam import VIEWS

from .conftest import GREEDY, RATIO, Kit, generated, same
from .tiny import CASES, SPECIAL


# Loads a folder where this library cannot be imported, and compares with what was saved beside it.
REMOTE = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers_rbl":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModel, AutoModelForImageTextToText
torch.set_num_threads(1)
folder = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
saved = torch.load(folder + "/expected.pt")
with torch.no_grad():
    sequences = model.generate(**saved["inputs"], **saved["settings"])
assert torch.equal(sequences, saved["sequences"]), sequences
headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(headless.codebook.prototypes, model.codebook.prototypes)
print(type(model).__name__, type(headless).__name__)
"""


def test_every_family_of_the_list_has_a_case():
    assert set(CASES) == set(FAMILIES)


def test_every_tensor_equals_stocks(kit: Kit):
    """Loaded from the layout that stock saves, full and headless; the codebook is all that is more."""
    headless = kit.full.headless.from_pretrained(kit.folder, codebook=kit.codebook, keep_ratio=RATIO)
    for ours, stock in ((kit.model, kit.stock), (headless, kit.stock.model)):
        tensors, expected = ours.state_dict(), stock.state_dict()
        assert all(torch.equal(value, tensors[name]) for name, value in expected.items())
        assert {name.removeprefix("model.") for name in set(tensors) - set(expected)} == {"codebook.prototypes"}


def layout_of_keys(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def test_every_tensor_equals_stocks_from_the_old_layout_of_keys_and_the_new_one(kit: Kit, tmp_path: Path):
    """Checkpoints on the Hub have the keys of the release that wrote them: transformers' own mapping, run backwards.
    Saved by stock, and by ours with a codebook; loaded full and headless."""
    old, new = {"save_original_format": True}, {"save_original_format": False}
    for name, layout in (("old", old), ("new", new)):
        kit.stock.save_pretrained(tmp_path / name, **layout)
        kit.model.save_pretrained(tmp_path / f"{name}-rbl", **layout)
    keys, mapping = layout_of_keys(tmp_path / "old"), get_model_conversion_mapping(kit.stock)
    assert layout_of_keys(tmp_path / "new") == set(kit.stock.state_dict()) - set(kit.stock.all_tied_weights_keys)
    expected = any(_renames(mapping, key) for key in keys)
    assert (keys != layout_of_keys(tmp_path / "new")) == expected
    given = {"codebook": kit.codebook, "keep_ratio": RATIO}
    for made, stock in ((kit.full, kit.stock), (kit.full.headless, kit.stock.model)):
        for name in ("old", "new"):
            readable = same_tensors(type(stock).from_pretrained(tmp_path / name), stock)
            assert readable or made is kit.full.headless, "stock reads its own checkpoints"
            for folder, settings in ((tmp_path / name, given), (tmp_path / f"{name}-rbl", {})):
                if not readable:  # Qwen2-VL's headless class takes the tower for a part of its language model
                    with pytest.raises(ValueError, match="does not hold every weight"):
                        made.from_pretrained(folder, **settings)
                    continue
                model = made.from_pretrained(folder, **settings)
                assert same_tensors(model, stock)
                assert torch.equal(model.base_model.codebook.prototypes, kit.codebook.prototypes)


def same_tensors(model: Any, expected: Any) -> bool:
    tensors = model.state_dict()
    return all(torch.equal(value, tensors[key]) for key, value in expected.state_dict().items())


def _renames(mapping: Any, key: str) -> bool:
    """Whether loading reads a key of the old layout under another name."""
    for transform in mapping:
        renamed, _ = transform.rename_source_key(key)
        if renamed != key:
            return True
    return False


def test_a_missing_weight_raises(kit: Kit, tmp_path: Path):
    """Contract 10."""
    (tmp_path / "config.json").write_text((kit.folder / "config.json").read_text())
    tensors = load_file(kit.folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if re.search(r"(layers|blocks)\.1\.", name) and "vis" not in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\."):
        kit.full.from_pretrained(tmp_path, codebook=kit.codebook, keep_ratio=RATIO)


def test_saved_and_loaded_by_every_door(kit: Kit, tmp_path: Path):
    """Contract 9: codebook and settings bit for bit, by our class, `AutoModelForImageTextToText` and `AutoModel`."""
    kit.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"{kit.name}_rbl"
    assert rbl_class(tmp_path) is kit.full
    with torch.no_grad():
        expected = kit.answers(kit.model, kit.one)
        for door in (kit.full, AutoModelForImageTextToText):
            again = door.from_pretrained(tmp_path).eval()
            assert type(again) is kit.full and again.pruning == kit.model.pruning
            assert all(torch.equal(value, again.state_dict()[name]) for name, value in kit.model.state_dict().items())
            assert same(kit.answers(again, kit.one), expected)
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is kit.full.headless
    assert torch.equal(headless.codebook.prototypes, kit.codebook.prototypes)


def test_classes_are_imported_and_pickled_by_name(kit: Kit):
    for made in (kit.full, kit.full.headless, kit.full.config_class):
        assert getattr(transformers_rbl, made.__name__) is made
        assert pickle.loads(pickle.dumps(made)) is made


CODE = [pytest.param(name, marks=() if name == "qwen3_vl" else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", CODE)
def test_remote_code_answers_where_this_library_cannot_be_imported(
    name: str, kits: Callable[[str], Kit], tmp_path: Path
):
    kit = kits(name)
    kit.model.save_pretrained(tmp_path, with_code=True)
    inputs = kit.inputs(kit.one, kit.two)
    sequences = kit.model.generate(**inputs, **GREEDY)
    torch.save({"inputs": inputs, "settings": GREEDY, "sequences": sequences}, tmp_path / "expected.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path)], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [kit.full.__name__, kit.full.headless.__name__]


@pytest.mark.slow
def test_a_name_is_imported_in_a_fresh_process():
    """PEP 562: the class is made when it is asked for."""
    line = "from transformers_rbl import Qwen3VLForConditionalGenerationRBL as made; print(made.stock.__name__)"
    run = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
    assert run.stdout.strip() == "Qwen3VLForConditionalGeneration", run.stderr


def test_families_outside_the_list_are_named_and_tried_on_demand():
    with pytest.raises(ValueError, match="not tested with blip_2 models"):
        family_class("blip_2")
    with pytest.raises(ValueError, match="no flamingo_9 models"):
        family_class("flamingo_9", allow_untested=True)


def test_tiles_of_one_image_share_its_budget_where_the_prompt_shows_them(kit: Kit):
    """Called through `forward` and `generate`; `get_image_features` alone sees tiles."""
    picture = kit.pictures[0]
    inputs = kit.inputs(kit.one)
    with torch.no_grad():
        output = kit.model(**inputs)
        generation = kit.model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        alone = kit.model.model.get_image_features(**kit.case.visual([kit.one]), return_dict=True)
    for masks in (output.keep_masks, generation.keep_masks):
        kept = [int(mask.sum()) - len(picture.ends) for mask in masks]
        assert kept == [max(1, round(RATIO * part)) for part in picture.parts]
    rows, columns = kit.case.sizes[0]
    shared = kit.model.family.apart is not None and kit.model.model.layouts(**kit.case.visual([kit.one])) is None
    tiles = rows * columns if shared else len(picture.parts)
    assert len(alone.keep_masks) == len(alone.pooler_output) == tiles


@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "qwen3_vl"])
def test_lora(name: str, kits: Callable[[str], Kit]):
    """With 1-D positions, m-RoPE, deepstack: an adapter that changes nothing answers alike, its weights get gradients
    through the pruned prompt."""
    peft: Any = pytest.importorskip("peft")
    kit = kits(name)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(kit.load(), settings)
    inputs = kit.inputs(kit.one, kit.two)
    assert same(generated(model, inputs), kit.answers(kit.model, kit.one, kit.two))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < len(SPECIAL), -100)
    loss = model(**inputs, labels=labels).loss
    assert torch.allclose(loss, kit.model(**inputs, labels=labels).loss, atol=2e-4)
    loss.backward()
    adapters = {name: weight.grad for name, weight in model.named_parameters() if "lora_B" in name}
    assert adapters and all(gradient is not None and gradient.isfinite().all() for gradient in adapters.values())
    language = [gradient for name, gradient in adapters.items() if "language_model" in name]
    assert language and all(gradient.abs().sum() > 0 for gradient in language)


def test_deepstack_rows_go_with_their_tokens(kits: Callable[[str], Kit]):
    """Each layer's view keeps the rows of the tokens that stay, and no others."""
    kit = kits("qwen3_vl")
    tensors = kit.case.visual([kit.two])
    with torch.no_grad():
        whole = kit.stock.model.get_image_features(**tensors, return_dict=True)
        ours = kit.model.model.get_image_features(**tensors, return_dict=True)
    assert len(ours.deepstack_features) == len(whole.deepstack_features) == 2
    for views, stock in zip(ours.deepstack_features, whole.deepstack_features):
        for view, tokens, mask in zip(views, stock, ours.keep_masks, strict=True):
            assert torch.equal(view, tokens[mask]) and len(view) < len(tokens)


def test_no_family_joins_tiles_that_have_further_views(kit: Kit):
    """Tokens of tiles are joined to images, views of theirs (deepstack) are not: a family with both would raise."""
    with torch.no_grad():
        output = kit.stock.model.get_image_features(**kit.case.visual([kit.one]), return_dict=True)
    assert kit.model.family.apart is None or all(output.get(name) is None for name in VIEWS)


def test_types_of_tokens_are_required_where_positions_depend_on_them(kit: Kit):
    """Contract 11: m-RoPE without `mm_token_type_ids`, PaliGemma without `token_type_ids`."""
    inputs = kit.inputs(kit.one)
    needed = hasattr(kit.stock.model, "get_rope_index") or kit.case.prefix
    if not needed:
        pytest.skip("Its positions do not depend on token types.")
    del inputs[kit.case.types]
    for call in (kit.model, kit.model.generate):
        with pytest.raises(ValueError, match=f"^{kit.case.types} is missing"):
            call(**inputs)
