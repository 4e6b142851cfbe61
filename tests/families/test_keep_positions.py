"""`keep_positions=True`: what stays keeps the positions of the unpruned prompt, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transformers_rbl import PruningConfig
from transformers_rbl.inputs import image_arguments, inputs_with_features
from transformers_rbl.models.seam import CACHE, can_chunk_images

from .conftest import ALL, GREEDY, OFF, RATIO, Answer, Kit, generated, same
from .tiny import EOS, SPECIAL, words


OWN = PruningConfig(keep_ratio=RATIO, keep_positions=True)
FOUR = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [*SPECIAL, EOS]}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def test_forward_equals_stock_at_the_positions_of_the_unpruned_prompt(kit: Kit):
    for prompt in (kit.one, kit.two):
        inputs = kit.inputs(prompt)
        state = kit.oracle.prepare(prompt, RATIO, keep_positions=True)
        for settings in ({}, {"use_cache": False}, {"attention_mask": None}):
            output = kit.model(**inputs | settings, pruning=OWN)
            torch.testing.assert_close(output.logits[0], kit.oracle.logits(state), atol=2e-4, rtol=0)


def test_it_changes_what_closing_up_gives_but_for_mrope(kit: Kit):
    closed, own = (kit.model(**kit.inputs(kit.one), pruning=rule).logits for rule in ({"keep_ratio": RATIO}, OWN))
    assert torch.equal(closed, own) == kit.model.family.mrope
    keep_all = PruningConfig(keep_ratio=1.0, keep_positions=True)
    logits = [kit.model(**kit.inputs(kit.one), pruning=rule).logits for rule in (ALL, keep_all)]
    assert torch.equal(*logits)


def test_generate_equals_the_oracle_and_a_batch_its_prompts(kit: Kit):
    prompts = [kit.one, kit.two, kit.text]
    single = [generated(kit.model, kit.inputs(prompt), pruning=OWN)[0] for prompt in prompts]
    for prompt, answer in zip(prompts, single):
        state = kit.oracle.prepare(prompt, RATIO, keep_positions=True)
        same([answer], [Answer(*kit.oracle.greedy(state))])
    same(generated(kit.model, kit.inputs(*prompts), pruning=OWN), single)


def test_a_second_turn_on_the_cache_equals_the_whole_conversation(kit: Kit):
    if kit.case.prefix:
        pytest.skip("What is said later is marked otherwise in this family.")
    inputs = kit.inputs(kit.one)
    first = kit.model.generate(**inputs, **FOUR, pruning=OWN, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([words(3, 7)])], 1)
    along = {name: value for name, value in inputs.items() if name in ("token_type_ids", "mm_token_type_ids")}
    along = {n: torch.nn.functional.pad(v, (0, more.shape[1] - v.shape[1])) for n, v in along.items()}
    visual = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask", *along)}
    call: dict[str, Any] = {"input_ids": more, "attention_mask": torch.ones_like(more), **along, **GREEDY}
    whole = kit.model.generate(**call, **visual, pruning=OWN)
    assert torch.equal(kit.model.generate(**call, **visual, **{CACHE: first[CACHE]}, pruning=OWN), whole)


def test_positions_of_the_user_keep_their_gaps_too(kit: Kit):
    if kit.model.family.mrope:
        pytest.skip("Positions in three dimensions are tested with the contracts.")
    inputs = kit.inputs(kit.one)
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    given = kit.model(**inputs, position_ids=positions, pruning=OWN).logits
    torch.testing.assert_close(given, kit.model(**inputs, pruning=OWN).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava_next", "smolvlm"])
def test_features_that_were_pruned_before_say_that_they_keep_their_positions(kits, name: str):
    kit = kits(name)
    inputs = kit.inputs(kit.two)
    expected = kit.model(**inputs, pruning=OWN).logits
    images = image_arguments(kit.model, inputs)
    handed = kit.model.get_image_features(**images, pruning=OWN, return_dict=True)
    whole = kit.model.get_image_features(**images, pruning=OFF, return_dict=True)
    later = kit.model.model.prune_image_features(whole, OWN, **images)
    for features in (handed, later):
        output = kit.model(**inputs_with_features(kit.model, inputs, features))
        torch.testing.assert_close(output.logits, expected, atol=2e-4, rtol=0)


def test_a_prompt_whose_images_and_videos_disagree_is_refused(kits):
    kit = kits("llava_next_video")
    prompt = [*kit.one, kit.case.movies()[0], words(2, 8)]
    inputs = kit.inputs(prompt)
    visual = {"image": image_arguments(kit.model, inputs)}
    visual["video"] = {"pixel_values_videos": inputs.pop("pixel_values_videos")}
    encoded = {
        modality: getattr(kit.model, f"get_{modality}_features")(**arguments, pruning=rule, return_dict=True)
        for (modality, arguments), rule in zip(visual.items(), (OWN, {"keep_ratio": RATIO}))
    }
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="prune both alike"):
        kit.model(**text, mm_encoder_outputs=encoded)


@pytest.mark.parametrize(
    "way",
    [
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 8},
        {"num_beams": 1, "num_return_sequences": 1, "do_sample": True, "temperature": 1e-4},
    ],
    ids=lambda way: next(iter(way)),
)
@pytest.mark.parametrize("name", ["llava_next", "mistral3"])
def test_every_way_to_generate_sees_the_same_positions(kits, name: str, way: dict[str, Any]):
    kit = kits(name)
    if "prefill_chunk_size" in way and not can_chunk_images():
        pytest.skip("This transformers cannot split images over chunks.")
    inputs = kit.inputs(kit.two)
    plain = kit.model.generate(**inputs, **FOUR, pruning=OWN)
    assert torch.equal(kit.model.generate(**inputs, **FOUR | way, pruning=OWN), plain)


def test_generate_without_a_cache_is_refused_since_stock_would_read_packed_sequences(kits):
    kit = kits("llava_next")
    with pytest.raises(ValueError, match="leave use_cache on"):
        kit.model.generate(**kit.inputs(kit.two), **FOUR, use_cache=False, pruning=OWN)


def test_mrope_leaves_no_gaps_and_refuses_nothing(kits):
    kit = kits("qwen3_vl")
    inputs, closed = kit.inputs(kit.two), {"keep_ratio": RATIO}
    one, other = (kit.model.generate(**inputs, **FOUR, use_cache=False, pruning=rule) for rule in (closed, OWN))
    assert torch.equal(one, other)


def test_gaps_that_flash_attention_would_read_as_packed_sequences_are_refused(kits):
    """Behind a cache: with the first turn, and in chunks."""
    kit = kits("llava_next")
    model, inputs = kit.load(), kit.inputs(kit.one)
    first = model.generate(**inputs, **FOUR, pruning=OWN, return_dict_in_generate=True)
    later = kit.inputs([first.sequences[0].tolist(), *kit.two])
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        model.generate(**later, **{CACHE: first[CACHE]}, **FOUR, pruning=OWN)
    if can_chunk_images():
        with pytest.raises(ValueError, match="from the second chunk on"):
            model.generate(**inputs, **FOUR, prefill_chunk_size=8, pruning=OWN)


@pytest.mark.parametrize("name", ["llava_next", "mistral3"])
def test_beams_of_a_batch_are_those_of_its_prompts(kits, name: str):
    kit = kits(name)
    beams = {**FOUR, "num_beams": 3, "num_return_sequences": 2}
    together = kit.model.generate(**kit.inputs(kit.one, kit.two), **beams, pruning=OWN)[:, -4:]
    apart = [kit.model.generate(**kit.inputs(prompt), **beams, pruning=OWN)[:, -4:] for prompt in (kit.one, kit.two)]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["llava_next", "gemma3"])
def test_a_loop_of_forward_calls_goes_on_behind_the_gaps(kits, name: str, given: bool):
    """Where the model counts, and where the user gives the positions of the unpruned prompt."""
    kit = kits(name)
    inputs = kit.inputs(kit.two)
    state = kit.oracle.prepare(kit.two, RATIO, keep_positions=True)
    output = kit.model(**inputs, pruning=OWN)
    for token in words(3, 9):
        state = kit.oracle.add(state, [token])
        more = {kit.case.types: torch.zeros(1, 1, dtype=torch.long)} if kit.case.types else {}
        if given:
            more["position_ids"] = torch.tensor([state.places[-1:]])
        output = kit.model(input_ids=torch.tensor([[token]]), **{CACHE: output[CACHE]}, **more)
        torch.testing.assert_close(output.logits[0, -1], kit.oracle.logits(state)[-1], atol=2e-4, rtol=0)
