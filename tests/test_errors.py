"""Contract 11: bad input gets a sentence."""

import dataclasses
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from conftest import GREEDY, visual
from transformers_rbl import LlavaForConditionalGenerationRBL, PruningConfig, RedundancyCodebook, rbl_class
from transformers_rbl.building.inspection import provenance_of
from transformers_rbl.models.layout import VisualLayout


def test_a_codebook_of_another_width(family):
    with pytest.raises(ValueError, match=r"width 16.*made for org/other.*width 32"):
        family.pruned(codebook=RedundancyCodebook(torch.randn(3, 16), base_model="org/other"))


def test_a_codebook_of_another_base_model(family, tmp_path):
    model = family.pruned()
    model.config.base_model = "org/this"
    model.save_pretrained(tmp_path)
    other = RedundancyCodebook(torch.randn(3, 32), base_model="org/other")
    with pytest.raises(ValueError, match=r"org/other.*org/this.*check_base"):
        family.rbl_class.from_pretrained(tmp_path, codebook=other)
    assert len(family.rbl_class.from_pretrained(tmp_path, codebook=other, check_base=False).codebook.prototypes) == 3


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"keep_ratio": 0.5, "threshold": 0.5}, "both were given"),
        ({"keep_ratio": 2}, r"\(0, 1\]"),
        ({"keep_ratio": 0.5, "pruning": PruningConfig(keep_ratio=0.5)}, "not both"),
        ({"keep_ratio": None, "pruning": {"keep_ratio": 0.5, "colour": 1}}, "Unknown pruning setting.* colour"),
        ({"codebook": None}, "no codebook"),
        ({"codebook": "/no/such/folder"}, "no folder with a codebook"),
    ],
)
def test_bad_arguments_of_from_pretrained(family, kwargs, words):
    with pytest.raises((ValueError, OSError), match=words):
        family.pruned(**kwargs)


def test_a_codebook_without_any_setting_says_that_pruning_is_off(family, caplog):
    import transformers

    transformers.utils.logging.enable_propagation()
    model = family.pruned(keep_ratio=None)
    transformers.utils.logging.disable_propagation()
    assert model.pruning is None and "pruning stays off" in caplog.text


def test_a_model_with_neither_codebook_nor_setting_says_once_that_pruning_is_off(family, caplog):
    import transformers

    transformers.utils.logging.warning_once.cache_clear()
    transformers.utils.logging.enable_propagation()
    try:
        for _ in range(2):
            assert family.pruned(codebook=None, keep_ratio=None).pruning is None
        family.pruned(codebook=None, keep_ratio=None, pruning={"enabled": False})
    finally:
        transformers.utils.logging.disable_propagation()
    assert caplog.text.count("pruning is off") == 1


def test_a_tensor_is_a_codebook(family, one):
    model = family.pruned(codebook=family.codebook.prototypes)
    assert torch.equal(model.generate(**one, **GREEDY), family.pruned().generate(**one, **GREEDY))
    with pytest.raises(ValueError, match=r"prototypes \(n, d\).*got \(32,\)"):
        family.pruned(codebook=family.codebook.prototypes[0])
    with pytest.raises(ValueError, match="codebook_revision belongs to a codebook from the Hub"):
        family.pruned(codebook=family.codebook.prototypes, codebook_revision="main")


def test_what_is_taken_for_a_codebook_and_is_none(family, pruned, tmp_path):
    torch.save(family.codebook.prototypes, tmp_path / "authors.pt")
    pruned.save_pretrained(tmp_path / "model")
    (tmp_path / "preset").mkdir()
    (tmp_path / "preset" / "recipe.yaml").write_text("num_images: 3\n")
    for name, words in {
        "authors.pt": r"authors\.pt is a file of torch\.save: `rbl convert .*authors\.pt FOLDER`",
        "model": "is a model, and its codebook is inside it: load the model",
        "preset": "holds the recipe of a codebook.*`rbl build --recipe preset",
        "nothing": "no folder with a codebook, nor a Hub id .*holds model, preset",
    }.items():
        with pytest.raises(OSError, match=words) as error:
            family.pruned(codebook=tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(OSError, match="is a model without a codebook: build one"):
        family.pruned(codebook=family.folder)


@pytest.mark.parametrize("name", ["./missing", "a/b/c", "book.pt", "tests/missing", "missing/"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.file_download._get_metadata_or_catch_error", asked)
    monkeypatch.setattr("transformers_rbl.models.names.get_hf_file_metadata", asked)
    monkeypatch.chdir(Path(__file__).parents[1])
    for load in (rbl_class, RedundancyCodebook.from_pretrained, LlavaForConditionalGenerationRBL.from_pretrained):
        with pytest.raises(OSError, match="nor a Hub id"):
            load(name)


@pytest.fixture
def no_network(monkeypatch):
    """A Hub at an address where nobody listens. Gives the seconds that are slept, which are not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    slept: list[float] = []
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


@pytest.mark.parametrize(
    "load", [rbl_class, RedundancyCodebook.from_pretrained, LlavaForConditionalGenerationRBL.from_pretrained]
)
def test_a_hub_id_without_a_network_is_refused_within_a_second(load, no_network):
    with pytest.raises(
        OSError, match=r"^org/missing is no folder here.*127\.0\.0\.1.* cannot be reached \(.+\): check"
    ):
        load("org/missing")
    assert sum(no_network) <= 1


def test_what_was_downloaded_before_is_read_without_a_network(no_network, tmp_path):
    folder, commit = tmp_path / "models--org--book", "0" * 40
    book = RedundancyCodebook(torch.randn(3, 8))
    book.save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert torch.equal(RedundancyCodebook.from_pretrained("org/book", cache_dir=tmp_path).prototypes, book.prototypes)
    assert provenance_of("org/book") is None and sum(no_network) <= 1


@pytest.mark.parametrize("setting", [field.name for field in dataclasses.fields(PruningConfig)])
def test_settings_of_a_call_go_into_pruning(pruned, one, setting):
    """Stock `forward` takes any keyword, and would not read these."""
    value, images = getattr(PruningConfig(keep_ratio=0.2), setting), visual(one)
    calls = [(pruned, one), (pruned.generate, one), (pruned.get_image_features, images)]
    for call, inputs in [*calls, (pruned.model.get_image_features, images)]:
        with pytest.raises(ValueError, match=rf"go into pruning=PruningConfig\({setting}=…\)"):
            call(**inputs, **{setting: value})
        with pytest.raises(ValueError, match="give it to from_pretrained, or call set_codebook"):
            call(**inputs, codebook=pruned.codebook)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_placeholders_and_images_that_do_not_match(family, pruned, call):
    run = pruned if call == "forward" else lambda **kwargs: pruned.generate(**kwargs, **GREEDY)
    two = family.inputs(["<s> <image> and <image>"])
    with pytest.raises(ValueError, match="placeholders, but its 1 image"):
        run(**{**two, **{key: value[:1] for key, value in visual(two).items()}})
    if family.has_tiles:
        with pytest.raises(ValueError, match="2 images came with 1 image_sizes"):
            run(**{**two, "image_sizes": two.image_sizes[:1]})
        with pytest.raises(ValueError, match="image_sizes is missing"):
            run(**{**two, "image_sizes": None})
        rows = family.inputs(["<s> <image>", "<s> <image>"], family.images(2))
        with pytest.raises(ValueError, match="middle of a"):
            run(**{**rows, **{key: value.flip(0) for key, value in visual(rows).items()}})


def test_masks_and_arguments_that_pruning_cannot_follow(pruned, one):
    length = one.input_ids.shape[1]
    with pytest.raises(ValueError, match="attention_mask of shape"):
        pruned(**{**one, "attention_mask": torch.ones(1, 1, length, length)})
    with pytest.raises(ValueError, match="shift_labels"):
        pruned(**one, shift_labels=one.input_ids)
    with pytest.raises(ValueError, match="needs the prompt"):
        pruned.generate(**visual(one))
    features = pruned.get_image_features(**visual(one))
    with pytest.raises(ValueError, match="not both"):
        pruned(**one, mm_encoder_outputs={"image": features})


def test_pruning_without_a_codebook(family, one):
    model = family.rbl_class.from_pretrained(family.folder)
    with pytest.raises(ValueError, match="no codebook"):
        model(**one, pruning=PruningConfig(keep_ratio=0.5))
    model.pruning = PruningConfig(keep_ratio=0.5)
    with pytest.raises(ValueError, match="no codebook"):
        model.generate(**one)
    model.codebook = family.codebook  # assignment sets it where it belongs
    assert model.codebook is model.model.codebook and "codebook" not in model._modules
    model.generate(**one, **GREEDY)


def test_saved_settings_from_a_newer_version(family, pruned, tmp_path):
    import json

    pruned.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pruning"]["attention_sink"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="attention_sink.*newer version of transformers_rbl: upgrade it. Or give pr"):
        family.rbl_class.from_pretrained(tmp_path)


def test_a_tower_whose_tokens_do_not_line_up(family, one):
    model = family.pruned()
    model.model.layouts = lambda *_, **__: [VisualLayout.of_patches(5)]
    with pytest.raises(ValueError, match="layout"):
        model(**one)


def test_a_model_made_from_a_config_alone_does_not_prune(family, pruned, one):
    model = family.rbl_class(pruned.config)
    with pytest.raises(ValueError, match="never loaded"):
        model(**one)
    model.load_state_dict(pruned.state_dict())
    assert torch.equal(model.eval()(**one).logits, pruned(**one).logits)


def test_a_max_length_shorter_than_the_prompt_names_the_original_length(pruned, one):
    length = one.input_ids.shape[1]
    with pytest.raises(ValueError, match=f"is {length}, but max_length is set to {length}"):
        pruned.generate(**one, max_length=length)
