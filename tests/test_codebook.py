"""The codebook: its scores, its artifact, and what it refuses."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.models.codebook import CARD_NAME, WEIGHTS_NAME


@pytest.fixture
def codebook():
    card = {"recommended_keep_ratio": 0.2, "recommended_threshold": 0.4, "built_with": {"images": 3}}
    return RedundancyCodebook(torch.randn(9, 6), base_model="org/base", **card)


def test_a_codebook_can_be_pickled(codebook):
    """For processes that share a model; it is never how one is saved."""
    again = pickle.loads(pickle.dumps(codebook))
    assert torch.equal(again.unit_prototypes, codebook.unit_prototypes)


def test_tokens_of_a_batch_are_refused(codebook):
    with pytest.raises(ValueError, match=r"\(L, d\)"):
        codebook.keep_mask(torch.randn(2, 3, codebook.prototypes.shape[1]), PruningConfig(keep_ratio=0.5))


def test_round_trip_keeps_every_bit_and_field(codebook, tmp_path):
    codebook.save_pretrained(tmp_path / "new" / "folder")
    again = RedundancyCodebook.from_pretrained(tmp_path / "new" / "folder")
    assert torch.equal(again.prototypes, codebook.prototypes) and again.metadata() == codebook.metadata()
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [CARD_NAME, WEIGHTS_NAME]
    assert again.recommended_pruning == PruningConfig(keep_ratio=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_prototypes_become_float32(dtype):
    prototypes = torch.randn(4, 3).to(dtype)
    assert torch.equal(RedundancyCodebook(prototypes).prototypes, prototypes.float())


def test_casts_do_not_touch_the_prototypes(codebook):
    before = codebook.prototypes.clone()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), codebook)
    for cast in (model.half, model.bfloat16, model.double, lambda: model.to(torch.float16)):
        cast()
        assert torch.equal(codebook.prototypes, before) and codebook.prototypes.dtype == torch.float32
        assert codebook.unit_prototypes.dtype == torch.float32
    assert model[0].weight.dtype == torch.float16
    model.to("meta")
    assert codebook.prototypes.device.type == "meta"


def test_scores_follow_a_loaded_state(codebook):
    other = RedundancyCodebook(torch.randn(9, 6))
    other.load_state_dict(codebook.state_dict())
    tokens = torch.randn(5, 6)
    assert torch.equal(other.score(tokens), codebook.score(tokens))
    assert list(codebook.state_dict()) == ["prototypes"]


def test_duplicates_may_go_and_scores_stay(codebook):
    rows = codebook.prototypes[[3, 0, 3, 1, 0]]
    doubled = RedundancyCodebook(rows, base_model="org/base")
    single = doubled.without_duplicates()
    assert torch.equal(single.prototypes, codebook.prototypes[[3, 0, 1]]) and single.base_model == "org/base"
    tokens = torch.randn(50, 6)
    torch.testing.assert_close(single.score(tokens), doubled.score(tokens), atol=1e-6, rtol=0)


def test_keep_mask(codebook):
    tokens = torch.randn(10, 6)
    mask = codebook.keep_mask(tokens, PruningConfig(keep_ratio=0.3))
    assert mask.dtype == torch.bool and mask.sum() == 3
    assert codebook.score(tokens)[mask].max() <= codebook.score(tokens)[~mask].min()
    assert codebook.keep_mask(tokens, PruningConfig(enabled=False)).all()


@pytest.mark.parametrize(
    ("prototypes", "words"),
    [
        (torch.zeros(3), r"\(n, d\)"),
        (torch.zeros(0, 3), r"\(n, d\)"),
        ([[1.0]], "list"),
        (torch.ones(2, 2, dtype=torch.long), "floating point"),
        (torch.tensor([[1.0, float("nan")], [1.0, 2.0]]), "1 of 2 prototypes hold NaN"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinite"),
        (torch.tensor([[1.0, 1.0], [0.0, 0.0]]), "1 of 2 prototypes are zero"),
    ],
)
def test_bad_prototypes_get_a_sentence(prototypes, words):
    with pytest.raises(ValueError, match=words):
        RedundancyCodebook(prototypes)


def test_tokens_of_another_width_get_a_sentence(codebook):
    with pytest.raises(ValueError, match="width 6"):
        codebook.score(torch.zeros(4, 7))


def change(folder, **fields):
    card = json.loads((folder / CARD_NAME).read_text())
    card = {key: value for key, value in {**card, **fields}.items() if value != "absent"}
    (folder / CARD_NAME).write_text(json.dumps(card))


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: cut(f / WEIGHTS_NAME), f"{WEIGHTS_NAME} is truncated"),
        (lambda f: (f / WEIGHTS_NAME).write_bytes(b"not safetensors"), "truncated or no safetensors"),
        (lambda f: (f / WEIGHTS_NAME).unlink(), f"{WEIGHTS_NAME} is missing"),
        (lambda f: (f / CARD_NAME).unlink(), f"{CARD_NAME} is missing"),
        (lambda f: (f / CARD_NAME).write_text("{"), f"{CARD_NAME} is no codebook description"),
        (lambda f: (f / CARD_NAME).write_text("[]"), f"{CARD_NAME} is no codebook description"),
        (lambda f: change(f, width="absent"), f"{CARD_NAME} is no codebook description"),
        (lambda f: change(f, width=7), "announces prototypes of shape"),
        (lambda f: change(f, version=2), "format version 2"),
        (lambda f: change(f, colour="red"), "unknown field.* colour"),
        (lambda f: change(f, recommended_keep_ratio=3), "keep_ratio is the share"),
        (lambda f: save_file({"prototypes": torch.full((9, 6), torch.nan)}, f / WEIGHTS_NAME), "NaN"),
        (lambda f: save_file({"other": torch.ones(9, 6)}, f / WEIGHTS_NAME), "holds .*other"),
    ],
)
def test_damaged_artifacts_name_the_file(codebook, tmp_path, damage, words):
    codebook.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=words):
        RedundancyCodebook.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path):
    with pytest.raises(OSError, match="no folder with a codebook"):
        RedundancyCodebook.from_pretrained(tmp_path / "missing")


def test_pickles_are_not_read(codebook, tmp_path):
    codebook.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    torch.save({"prototypes": codebook.prototypes}, tmp_path / "codebook.pt")
    torch.save({"prototypes": codebook.prototypes}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="no safetensors"):
        RedundancyCodebook.from_pretrained(tmp_path)


def test_push_uploads_what_save_writes(codebook, monkeypatch):
    from types import SimpleNamespace

    from transformers_rbl.hub import push as module

    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, **kwargs):
            seen.update(kwargs)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **kwargs):
            seen.update(kwargs, tensors=load_file(f"{folder_path}/{WEIGHTS_NAME}"))
            seen["card"] = (Path(folder_path) / "README.md").exists()
            return "commit"

        def file_exists(self, repo_id, filename, revision=None):
            return repo_id == "org/with-card" and filename == "README.md" and revision == "dev"

    monkeypatch.setattr(module, "HfApi", Api)
    assert codebook.push_to_hub("org/book", private=True, token="t", revision="dev") == "commit"
    assert torch.equal(seen["tensors"]["prototypes"], codebook.prototypes)
    assert seen["card"]
    codebook.push_to_hub("org/with-card", revision="dev")
    assert not seen["card"]  # a card of the user's own stays
    codebook.push_to_hub("org/book", private=True, token="t", revision="dev")
    assert (seen["repo_id"], seen["private"], seen["token"], seen["revision"]) == ("org/book", True, "t", "dev")
