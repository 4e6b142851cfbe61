"""Every family pushed to a Hub on this machine over the real client, and pulled by every door; models pickled whole."""

from __future__ import annotations

import pickle

import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForImageTextToText

from hub_server import OWNER_TOKEN
from test_hub import hub as hub
from transformers_rbl import RedundancyCodebook
from transformers_rbl.models.auto_rbl import rbl_class

from .conftest import Kit, same


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.slow
def test_pushed_and_pulled(hub, kit: Kit, tmp_path):
    """A stock checkpoint and a codebook of two repositories, and a pruned model of one, answer as the model here."""
    model, book, stock = (f"org/{kit.name}-{kind}" for kind in ("rbl", "codebook", "stock"))
    kit.model.push_to_hub(model, token=OWNER_TOKEN)
    kit.codebook.push_to_hub(book, token=OWNER_TOKEN)
    api = HfApi(endpoint=hub.url, token=OWNER_TOKEN)
    api.create_repo(stock)
    api.upload_folder(repo_id=stock, folder_path=kit.folder)
    caches = {"cache_dir": tmp_path}
    assert rbl_class(model, **caches) is kit.full and rbl_class(stock, **caches) is kit.full
    pulled = [
        AutoModelForImageTextToText.from_pretrained(model, **caches),
        kit.full.from_pretrained(model, **caches),
        kit.load_from(stock, codebook=RedundancyCodebook.from_pretrained(book, **caches), **caches),
    ]
    expected = kit.answers(kit.model, kit.one, kit.two)
    for again in pulled:
        assert type(again) is kit.full
        assert same(kit.answers(again.eval(), kit.one, kit.two), expected)


def test_a_model_is_pickled_whole(kit: Kit):
    again = pickle.loads(pickle.dumps(kit.load()))  # one that was never called: transformers hangs hooks on others
    assert type(again) is kit.full and again.pruning == kit.model.pruning
    assert same(kit.answers(again, kit.one, kit.two), kit.answers(kit.model, kit.one, kit.two))
