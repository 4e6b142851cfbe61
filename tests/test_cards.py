"""A codebook's card: valid metadata, nothing made up, and a snippet that runs."""

import re

import pytest
import torch
from huggingface_hub import ModelCard

from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.hub.cards import codebook_card


def test_a_users_own_notes_do_no_harm():
    book = RedundancyCodebook(torch.randn(3, 4), built_with={"images": 3, "source": {"by": "hand"}, "words": "few"})
    assert "built from" not in codebook_card(book).text


def test_a_bare_codebook_makes_nothing_up(tmp_path):
    codebook_card(RedundancyCodebook(torch.randn(3, 4))).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data["library_name"] == "transformers_rbl" and card.data.base_model is None
    assert "| prototypes | 3 x 4, float32 |" in card.text and "none: measure your own" in card.text
    for words in ("How it was built", "converted from", "None", "built from"):
        assert words not in card.text


def test_what_a_codebook_knows_is_told():
    built = {
        "images": {"probed": 90, "count": 100, "source": "coco"},
        "words": {"sky|blue": 7},
        "tokens": {"probed": 960, "p1 below 0.1": 40},
        "source": {"file": "a.pt", "sha256": "abc"},
    }
    book = RedundancyCodebook(torch.randn(3, 4), "org/model", recommended_threshold=0.4, built_with=built)
    text = codebook_card(book, "org/book").text
    for words in (
        "90 images of coco",
        "'sky\\|blue' (7)",
        "| p1 below 0.1 | 40 |",
        "a.pt, sha256 abc",
        "threshold 0.4",
    ):
        assert words in text, words
    assert codebook_card(book).data.base_model == "org/model"


@pytest.mark.parametrize("setting", [{"recommended_keep_ratio": 0.3}, {}])
def test_the_snippet_runs(family, tmp_path, setting):
    book = RedundancyCodebook(family.codebook.prototypes, str(family.folder), **setting)
    book.save_pretrained(tmp_path)
    snippet = re.search(r"```python\n(.*?)```", codebook_card(book, str(tmp_path)).text, re.DOTALL).group(1)
    names = {}
    exec(snippet, names)
    assert type(names["model"]) is family.rbl_class
    assert names["model"].pruning == PruningConfig(keep_ratio=setting.get("recommended_keep_ratio", 0.2))


def test_a_saved_models_folder_says_which_import_is_missing(family, pruned, tmp_path):
    """Loaded by a stranger, it is of a model type that transformers does not know."""
    pruned.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "import transformers_rbl  #" in card and "with_code=True" in card and family.name in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    family.processor.save_pretrained(tmp_path)
    names = {}
    exec(snippet.replace(f"path/to/{tmp_path.name}", str(tmp_path)), names)
    assert names["model"].pruning == pruned.pruning
    (tmp_path / "README.md").write_text("mine")
    pruned.save_pretrained(tmp_path, with_code=True)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_headless_model_says_nothing_that_is_not_so(pruned, tmp_path):
    pruned.model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()  # the card's snippet loads full models
