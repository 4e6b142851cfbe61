"""Layers of the vision tower behind the selected one are not run, and nothing else changes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from transformers_rbl.models.family import Family
from transformers_rbl.models.llava_family import LlavaFamily
from transformers_rbl.models.tower import received_attention
from transformers_rbl.models.tower_views import distinct, up_to_layer


FAMILIES = ("llava", "llava_next", "llava_next_video", "vipllava")


def encoder_of(model: Any) -> Any:
    tower = model.base_model.vision_tower
    return tower.encoder if hasattr(tower, "encoder") else tower.vision_model.encoder


def layers_run(model: Any, call: Any) -> list[int]:
    run: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: run.append(number))
        for number, layer in enumerate(encoder_of(model).layers)
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return run


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_behind_the_selected_one_are_not_run(kits, name: str, monkeypatch: pytest.MonkeyPatch):
    model, inputs = kits(name).model, kits(name).inputs(kits(name).two)
    depth, before = len(encoder_of(model).layers), dict(vars(model.base_model))
    answers = []
    assert layers_run(model, lambda: answers.append(model(**inputs))) == list(range(depth - 1))
    assert len(encoder_of(model).layers) == depth
    assert dict(vars(model.base_model)) == before
    monkeypatch.setattr(type(model.family), "stopped", Family.stopped)
    assert layers_run(model, lambda: answers.append(model(**inputs))) == list(range(depth))
    short, whole = answers
    assert torch.equal(short.logits, whole.logits)
    assert all(torch.equal(a, b) for a, b in zip(short.keep_masks, whole.keep_masks))


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 2, -1, -2, [-2, 1], [-3, -1]])
def test_whatever_layer_is_selected(kits, layer: Any, monkeypatch: pytest.MonkeyPatch):
    kit = kits("llava")
    model = kit.model.base_model
    if isinstance(layer, list):  # the projector of this model reads one layer: look at the tower alone
        depth = len(encoder_of(model).layers)
        view = up_to_layer(model, max(index if index >= 0 else depth + 1 + index for index in layer))
        pixels = kit.inputs(kit.one)["pixel_values"]
        whole = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        short = view.vision_tower(pixels, output_hidden_states=True).hidden_states
        assert all(torch.equal(a, b) for a, b in zip(short, whole))
        return
    arguments = {"pixel_values": kit.inputs(kit.one)["pixel_values"], "vision_feature_layer": layer}
    short = model.get_image_features(**arguments)
    monkeypatch.setattr(LlavaFamily, "stopped", Family.stopped)
    whole = model.get_image_features(**arguments)
    assert torch.equal(short.pooler_output[0], whole.pooler_output[0])


@torch.no_grad()
def test_similarities_with_cls_are_those_of_the_whole_tower(kits, monkeypatch: pytest.MonkeyPatch):
    kit = kits("llava_next")
    rule = {"keep_ratio": 0.3, "score": "cls_similarity_high"}
    short = kit.model(**kit.inputs(kit.two), pruning=rule)
    monkeypatch.setattr(LlavaFamily, "stopped", Family.stopped)
    assert torch.equal(short.logits, kit.model(**kit.inputs(kit.two), pruning=rule).logits)


@torch.no_grad()
def test_threads_do_not_meet(kits):
    kit = kits("llava")
    model, pixels = kit.model.base_model, kit.inputs(kit.one)["pixel_values"]
    expected = {layer: model.get_image_features(pixels, vision_feature_layer=layer) for layer in (1, 2)}
    wrong: list[int] = []

    def work(layer: int) -> None:
        for _ in range(40):
            features = model.get_image_features(pixels, vision_feature_layer=layer)
            if not torch.equal(features.pooler_output[0], expected[layer].pooler_output[0]):
                wrong.append(layer)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
def test_a_tower_of_another_class_runs_whole(kits, monkeypatch: pytest.MonkeyPatch):
    """Subclasses and towers with a `forward` of their own may do anything with their layers."""
    kit = kits("llava")
    model, tower = kit.model, kit.model.base_model.vision_tower
    depth = len(encoder_of(model).layers)
    monkeypatch.setitem(vars(tower), "forward", tower.forward)
    assert layers_run(model, lambda: model(**kit.inputs(kit.one))) == list(range(depth))
    monkeypatch.delitem(vars(tower), "forward")
    monkeypatch.setattr(tower, "__class__", type("Own", (type(tower),), {}))
    assert up_to_layer(model.base_model, 1) is model.base_model


def test_gradients_reach_the_layers_that_were_run(kits):
    model = kits("llava").load()
    model(**kits("llava").inputs(kits("llava").one)).logits.sum().backward()
    has_gradient = [layer.mlp.fc1.weight.grad is not None for layer in encoder_of(model).layers]
    assert has_gradient == [True] * (len(has_gradient) - 1) + [False]


def rows_encoded(model: Any, call: Any) -> int:
    """Images, tiles and frames that pass the tower's first layer."""
    rows: list[int] = []
    hook = encoder_of(model).layers[0].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        call()
    finally:
        hook.remove()
    return sum(rows)


def test_equal_images_are_found_and_no_others():
    images = torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    images[2], images[4], images[5] = images[0], images[1], images[0]
    assert distinct(images) == ([0, 1, 3], [0, 1, 0, 2, 1, 0])
    images[2, 1, 7, 7] += 1e-3  # a pixel that no probe looks at
    assert distinct(images) == ([0, 1, 2, 3], [0, 1, 2, 3, 1, 0])
    assert distinct(images[:1]) == ([0], [0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_an_image_sent_twice_is_encoded_once(kits, name: str):
    kit = kits(name)
    once, twice = kit.inputs(kit.one), kit.inputs(kit.one, kit.one)
    images = rows_encoded(kit.model, lambda: kit.model(**once))
    answers = []
    assert rows_encoded(kit.model, lambda: answers.append(kit.model(**twice))) == images
    apart = {**kit.model.config.pruning, "encode_once": False}
    assert rows_encoded(kit.model, lambda: answers.append(kit.model(**twice, pruning=apart))) == 2 * images
    shared, each = answers
    torch.testing.assert_close(shared.logits, each.logits, atol=1e-6, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(shared.keep_masks, each.keep_masks))
    settings = {"max_new_tokens": 5, "do_sample": False}
    ids = [kit.model.generate(**twice, **settings, pruning=rule) for rule in (None, apart)]
    assert torch.equal(*ids)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiles_without_content_are_encoded_once(kits, name: str):
    kit = kits(name)
    inputs = kit.inputs(kit.one)
    pixels = inputs["pixel_values"] = inputs["pixel_values"].clone()
    tiles = pixels.flatten(0, -4)
    tiles[1:] = tiles[1, :, :1, :1]
    count = rows_encoded(kit.model, lambda: kit.model(**inputs))
    apart = {**kit.model.config.pruning, "encode_once": False}
    assert count == 2 < rows_encoded(kit.model, lambda: kit.model(**inputs, pruning=apart))


@torch.no_grad()
def test_a_video_that_stands_still_is_one_frame(kits):
    kit = kits("llava_next_video")
    model = kit.model.base_model
    side = model.config.vision_config.image_size
    still = torch.randn(1, 1, 3, side, side).expand(1, 6, -1, -1, -1).clone()
    still[0, 4] += 1
    features = []
    assert rows_encoded(model, lambda: features.append(model.get_video_features(still))) == 2
    apart = {**model.config.pruning, "encode_once": False}
    assert rows_encoded(model, lambda: features.append(model.get_video_features(still, pruning=apart))) == 6
    torch.testing.assert_close(features[0].pooler_output[0], features[1].pooler_output[0], atol=1e-6, rtol=0)


def test_in_training_every_image_is_encoded(kits):
    kit = kits("llava")
    model = kit.load().train()
    twice = kit.inputs(kit.one, kit.one)
    assert rows_encoded(model, lambda: model(**twice)) == 2


@pytest.mark.parametrize("from_cls", [True, False])
def test_attention_is_float32_under_autocast(from_cls):
    queries, keys = torch.randn(2, 2, 9, 3, 8, generator=torch.Generator().manual_seed(0))
    expected = received_attention(queries, keys, from_cls)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(received_attention(queries, keys, from_cls), expected)
