"""A placeholder that the attention mask hides takes its own feature out with it, as in the stock model."""

import pytest
import torch

import tiny_checkpoint
from conftest import GREEDY, visual
from transformers_rbl import PruningConfig


TWO = ["<s>USER: see <image> and <image>, then choose. ASSISTANT:"]
MODES = {"greedy": GREEDY, "beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 2}}


def new_tokens(sequences, ids):
    return sequences[:, ids.shape[1] :]


@pytest.fixture
def first_image_hidden(family, pruned):
    """A prompt with two images whose mask hides the first, and the prompt without it."""
    inputs = family.inputs(TWO, family.images(2))
    places = (inputs.input_ids[0] == tiny_checkpoint.IMAGE).nonzero()[:, 0]
    hidden = places[: len(pruned.model.token_kinds(**inputs)[0])]
    mask = inputs.attention_mask.clone()
    mask[0, hidden] = 0
    ids = torch.cat([inputs.input_ids[:, : hidden[0]], inputs.input_ids[:, hidden[-1] + 1 :]], dim=1)
    second = pruned.model.family.select(pruned.model, "image", dict(visual(inputs)), [1])
    return {**inputs, "attention_mask": mask}, {"input_ids": ids, "attention_mask": torch.ones_like(ids), **second}


@pytest.mark.parametrize("mode", MODES)
def test_a_hidden_image_answers_as_if_it_were_not_there(pruned, first_image_hidden, mode):
    hidden, without = first_image_hidden
    ours, expected = pruned.generate(**hidden, **MODES[mode]), pruned.generate(**without, **MODES[mode])
    assert torch.equal(new_tokens(ours, hidden["input_ids"]), new_tokens(expected, without["input_ids"]))


def test_forward_of_a_hidden_image(pruned, first_image_hidden):
    hidden, without = first_image_hidden
    ours, expected = pruned(**hidden), pruned(**without)
    torch.testing.assert_close(ours.logits, expected.logits, atol=2e-4, rtol=0)
    assert not ours.prompt_mask[hidden["attention_mask"] == 0].any()


@pytest.mark.parametrize("mode", MODES)
def test_a_hidden_part_of_an_image_equals_the_stock_model_on_the_rest(stock, pruned, oracle, family, mode):
    """Some placeholders of each image are hidden: the stock language model on the embeddings that are left."""
    settings = PruningConfig(keep_ratio=0.5)
    inputs = family.inputs(TWO, family.images(2))
    places = (inputs.input_ids[0] == tiny_checkpoint.IMAGE).nonzero()[:, 0]
    mask = inputs.attention_mask.clone()
    mask[0, places[::3]] = 0
    embeds, positions = oracle.embed({**inputs, "attention_mask": mask}, 0, settings)
    expected = stock.generate(input_ids=inputs.input_ids[:, positions], inputs_embeds=embeds, **MODES[mode])
    ours = pruned.generate(**{**inputs, "attention_mask": mask}, pruning=settings, **MODES[mode])
    assert torch.equal(new_tokens(ours, inputs.input_ids), expected[:, len(positions) :])


@pytest.mark.parametrize("mode", MODES)
def test_padding_that_is_the_placeholder_hides_images_as_stock_does(stock, pruned, family, mode):
    inputs = family.inputs(TWO, family.images(2))
    given = {"input_ids": inputs.input_ids, **visual(inputs), **MODES[mode], "pad_token_id": tiny_checkpoint.IMAGE}
    assert torch.equal(pruned.generate(**given), stock.generate(**given))
