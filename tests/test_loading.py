"""Contracts 9 and 10: checkpoints of every layout load completely or raise, and what is saved comes back bit for
bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BertConfig,
    BitsAndBytesConfig,
    pipeline,
)

import tiny_checkpoint
from conftest import GREEDY, ONE
from transformers_rbl import PruningConfig, RedundancyCodebook, rbl_class


HUB_LAYOUT = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)


def in_hub_layout(name):
    old, new = next((old, new) for old, new in HUB_LAYOUT if name.startswith(old))
    return new + name[len(old) :]


def write(family, folder, layout="hub", tied=False, shards=1, without=()):
    """A stock checkpoint as the Hub has it (keys of 2024) or as the installed transformers saves it."""
    shutil.copytree(family.folder, folder)
    model = family.stock()
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
        model.config.tie_word_embeddings = True
        model.config.text_config.tie_word_embeddings = True
    if layout == "saved":
        model.save_pretrained(folder, max_shard_size="40KB" if shards > 1 else "5GB")
        if shards > 1:
            (folder / "model.safetensors").unlink(missing_ok=True)
    else:
        tensors = {in_hub_layout(name): tensor for name, tensor in model.state_dict().items()}
        if tied:
            del tensors["language_model.lm_head.weight"]
        for name in without:
            del tensors[name]
        names = sorted(tensors)
        (folder / "model.safetensors").unlink()
        files = {}
        for k in range(shards):
            file = "model.safetensors" if shards == 1 else f"model-{k + 1:05}-of-{shards:05}.safetensors"
            save_file({n: tensors[n].clone() for n in names[k::shards]}, folder / file, metadata={"format": "pt"})
            files.update(dict.fromkeys(names[k::shards], file))
        if shards > 1:
            index = {"metadata": {"total_size": 1}, "weight_map": files}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        model.config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["hub", "saved"])
def test_every_tensor_equals_the_stock_class(family, tmp_path, layout, tied, shards):
    folder = write(family, tmp_path / "checkpoint", layout, tied, shards)
    truth = family.stock().state_dict()
    if tied:
        truth["lm_head.weight"] = truth["model.language_model.embed_tokens.weight"]
    full, headless = family.rbl_class.from_pretrained(folder), family.headless_class.from_pretrained(folder)
    stock = family.stock_class.from_pretrained(folder).state_dict()
    assert full.state_dict().keys() == truth.keys() == stock.keys()
    for name, tensor in full.state_dict().items():
        assert torch.equal(tensor, truth[name]) and torch.equal(tensor, stock[name]), name
    for name, tensor in headless.state_dict().items():
        assert torch.equal(tensor, truth[f"model.{name}"]), name
    assert len(headless.state_dict()) == sum(name.startswith("model.") for name in truth)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
        ("multi_modal_projector.linear_2.bias", "model.multi_modal_projector.linear_2.bias"),
        ("image_newline", "model.image_newline"),
        ("vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight", "encoder.layers.1.mlp.fc1.weight"),
        ("vision_tower.vision_model.embeddings.class_embedding", "embeddings.class_embedding"),
    ],
)
def test_a_missing_weight_raises_and_is_named(family, tmp_path, missing, named):
    if missing not in {in_hub_layout(name) for name in family.stock().state_dict()}:
        pytest.skip(f"{family.name} has no such weight")
    folder = write(family, tmp_path / "checkpoint", without=[missing])
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        family.rbl_class.from_pretrained(folder)


def test_weights_that_no_forward_reads_may_be_missing(family, tmp_path, one, stock):
    tower = "vision_tower.vision_model."
    unused = [f"{tower}post_layernorm.weight", f"{tower}post_layernorm.bias"]
    if family.name != "llava_onevision":  # of 3 layers, feature layer -2 reads the first two, -1 all
        unused.append(f"{tower}encoder.layers.2.mlp.fc1.weight")
    folder = write(family, tmp_path / "checkpoint", without=unused)
    model = family.rbl_class.from_pretrained(folder).eval()
    assert torch.equal(model.generate(**one, **GREEDY), stock.generate(**one, **GREEDY))


def test_the_normal_path_is_quiet(family, capfd, caplog):
    caplog.clear()
    family.pruned()
    family.rbl_class.from_pretrained(family.folder)
    printed = capfd.readouterr()
    for word in ("You are using a model of type", "newly initialized", "MISSING", "UNEXPECTED"):
        assert word not in printed.out + printed.err + caplog.text


@pytest.fixture(scope="module")
def saved(family, pruned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pruned.save_pretrained(folder)
    family.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForMultimodalLM, None])
def test_a_saved_model_loads_with_nothing_said(family, pruned, one, saved, auto):
    model = (auto or family.rbl_class).from_pretrained(saved).eval()
    assert type(model) is family.rbl_class and model.pruning == pruned.pruning
    assert torch.equal(model.codebook.prototypes, pruned.codebook.prototypes)
    assert torch.equal(model.generate(**one, **GREEDY), pruned.generate(**one, **GREEDY))


def test_auto_model_gives_the_headless_model(family, pruned, one, saved):
    model = AutoModel.from_pretrained(saved).eval()
    assert type(model) is family.headless_class
    torch.testing.assert_close(model(**one).last_hidden_state, pruned.model(**one).last_hidden_state)
    headless = family.headless_class.from_pretrained(family.folder, codebook=pruned.codebook, keep_ratio=0.3).eval()
    torch.testing.assert_close(headless(**one).last_hidden_state, pruned.model(**one).last_hidden_state)


def test_only_safetensors_is_written(saved):
    assert not [path.name for path in saved.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    stored = {name: tensor for file in saved.glob("*.safetensors") for name, tensor in load_file(file).items()}
    books = [tensor for name, tensor in stored.items() if name.endswith("codebook.prototypes")]
    assert len(books) == 1 and books[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_codebook_survives_low_precision(family, pruned, tmp_path, saved, dtype):
    model = family.rbl_class.from_pretrained(saved, dtype=dtype)
    model.to(torch.float32).to(dtype)
    model.save_pretrained(tmp_path)
    again = family.rbl_class.from_pretrained(tmp_path, dtype="auto")
    assert again.lm_head.weight.dtype == dtype
    for loaded in (model, again):
        assert loaded.codebook.prototypes.dtype == torch.float32
        assert torch.equal(loaded.codebook.prototypes, pruned.codebook.prototypes)


def test_all_settings_survive(family, pruned, tmp_path):
    settings = PruningConfig(
        threshold=0.4,
        score="double_softmax",
        min_tokens=5,
        newlines="row",
        tiles="base",
        keep_positions=True,
        per_frame=False,
        seed=3,
    )
    model = family.pruned(keep_ratio=None, pruning=settings)
    model.config.full_length_logits = True
    model.save_pretrained(tmp_path)
    again = family.rbl_class.from_pretrained(tmp_path)
    assert again.pruning == settings and again.config.full_length_logits
    overridden = family.rbl_class.from_pretrained(tmp_path, keep_ratio=0.5)
    assert overridden.pruning == PruningConfig(keep_ratio=0.5)
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path, pruning=PruningConfig(keep_ratio=0.7))
    assert auto.pruning == PruningConfig(keep_ratio=0.7)


def test_pipeline(family, stock, saved):
    image = family.images(2)[1]
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    ours = pipeline("image-text-to-text", model=str(saved))
    theirs = pipeline("image-text-to-text", model=str(family.folder))

    def answer(pipe, **generate_kwargs):
        kwargs = {"do_sample": False, "max_new_tokens": 8, **generate_kwargs}
        return pipe(text=messages, return_full_text=False, generate_kwargs=kwargs)[0]["generated_text"]

    assert answer(ours, pruning=PruningConfig(keep_ratio=1.0)) == answer(theirs)
    assert answer(ours) != answer(theirs)


def test_sharded_saving(family, pruned, one, tmp_path):
    pruned.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(model.codebook.prototypes, pruned.codebook.prototypes)
    assert torch.equal(model.generate(**one, **GREEDY), pruned.generate(**one, **GREEDY))


def test_a_saved_model_without_its_codebook_raises(family, pruned, tmp_path):
    pruned.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "codebook" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"codebook\.prototypes"):
        family.rbl_class.from_pretrained(tmp_path)
    other = RedundancyCodebook(torch.randn(3, 32))
    assert len(family.rbl_class.from_pretrained(tmp_path, codebook=other).codebook.prototypes) == 3


def test_a_codebook_from_a_folder_with_its_recommended_setting(family, tmp_path):
    book = RedundancyCodebook(torch.randn(5, 32), recommended_threshold=0.4)
    book.save_pretrained(tmp_path)
    model = family.rbl_class.from_pretrained(family.folder, codebook=tmp_path)
    assert model.pruning == PruningConfig(threshold=0.4) and model.config.num_prototypes == 5
    assert family.rbl_class.from_pretrained(family.folder, codebook=tmp_path, keep_ratio=0.5).pruning.keep_ratio == 0.5


def test_a_stock_config_object_is_accepted(family):
    config = family.stock_class.config_class.from_pretrained(family.folder)
    model = family.rbl_class.from_pretrained(family.folder, config=config)
    assert type(model.config) is family.rbl_class.config_class and model.config.model_type == f"{family.name}_rbl"


def test_another_family_is_named(family, tmp_path):
    other = {"llava": "llava_next", "llava_next": "llava_onevision", "llava_onevision": "llava"}[family.name]
    folder = tiny_checkpoint.build(tmp_path, other)
    with pytest.raises(ValueError, match=f"is a {other} checkpoint"):
        family.rbl_class.from_pretrained(folder)


def test_the_class_for_a_checkpoint(family, saved, tmp_path):
    assert rbl_class(family.folder) is rbl_class(saved) is family.rbl_class
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bert model.*llava, llava_next, .*qwen3_vl, .*allow_untested"):
        rbl_class(tmp_path)
    for name, words in (
        ("recipe.yaml", "holds a codebook's recipe, no model"),
        ("codebook.json", "is a codebook, no model"),
    ):
        (tmp_path / "config.json").unlink(missing_ok=True)
        (tmp_path / name).write_text("{}")
        with pytest.raises(OSError, match=words):
            rbl_class(tmp_path)


def test_stock_classes_stay_stock(family, stock):
    """Registering ours must not change what a stock checkpoint loads as."""
    assert type(AutoModelForImageTextToText.from_pretrained(family.folder)) is type(stock)
    assert type(AutoModel.from_pretrained(family.folder)) is family.stock_headless


def test_device_map_and_disk_offload(family, pruned, one, saved, tmp_path):
    expected = pruned.generate(**one, **GREEDY)
    model = family.rbl_class.from_pretrained(saved, device_map="cpu")
    assert torch.equal(model.generate(**one, **GREEDY), expected)
    split = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "cpu",
        "model.image_newline": "cpu",
        "model.codebook": "cpu",
        "model.language_model": "disk",
        "lm_head": "cpu",
    }
    model = family.rbl_class.from_pretrained(saved, device_map=split, offload_folder=tmp_path)
    assert torch.equal(model.codebook.prototypes, pruned.codebook.prototypes)
    assert torch.equal(model.generate(**one, **GREEDY), expected)


@pytest.mark.parametrize("also", ["model.codebook", "model.multi_modal_projector"])
def test_a_codebook_that_a_device_map_sends_to_disk_stays_in_memory(family, pruned, one, saved, tmp_path, also):
    """`offload_buffers=True` offloads it like any weight; it is small, and every image reads it."""
    parts = ["vision_tower", "multi_modal_projector", "image_newline", "language_model"]
    split = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu", "model.codebook": "disk", also: "disk"}
    model = family.rbl_class.from_pretrained(saved, device_map=split, offload_folder=tmp_path, offload_buffers=True)
    assert torch.equal(model.codebook.prototypes, pruned.codebook.prototypes)
    assert torch.equal(model.generate(**one, **GREEDY), pruned.generate(**one, **GREEDY))


def test_processor_loads_from_a_saved_model(family, saved):
    assert type(AutoProcessor.from_pretrained(saved)) is type(family.processor)


def test_quantised_loading(family, tmp_path):
    """4 bits by bitsandbytes: off is stock, quantiser keys are not missed, the codebook stays float32."""
    folder = tiny_checkpoint.build(tmp_path / "wide", family.name, width=64, vision_width=64)
    inputs = family.inputs(ONE, family.images(1))

    def load(loader, **kwargs):
        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        return loader.from_pretrained(folder, quantization_config=quantised, device_map="cpu", **kwargs).eval()

    book = RedundancyCodebook(torch.randn(5, 64))
    stock, model = load(family.stock_class), load(family.rbl_class, codebook=book, keep_ratio=0.3)
    off = PruningConfig(enabled=False)
    with torch.no_grad():
        assert torch.equal(model(**inputs, pruning=off).logits, stock(**inputs).logits)
    assert torch.equal(model.codebook.prototypes, book.prototypes)
    assert model.generate(**inputs, **GREEDY).shape[1] > inputs.input_ids.shape[1]
    model.save_pretrained(tmp_path / "saved")
    again = family.rbl_class.from_pretrained(tmp_path / "saved", device_map="cpu")
    assert torch.equal(again.codebook.prototypes, book.prototypes)


def test_a_saved_model_knows_where_its_codebook_comes_from(family, tmp_path):
    book = RedundancyCodebook(
        family.codebook.prototypes, recommended_threshold=0.4, built_with={"images": 3, "recipe": {"seed": 1}}
    )
    family.pruned(codebook=book).save_pretrained(tmp_path)
    again = family.rbl_class.from_pretrained(tmp_path)
    assert again.codebook.metadata() == book.metadata() and torch.equal(again.codebook.prototypes, book.prototypes)
