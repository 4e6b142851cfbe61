"""Contract 5: a batch gives each row the result of running it alone."""

import pytest
import torch

import tiny_checkpoint
from conftest import GREEDY, TEXTS, visual
from transformers_rbl import PruningConfig


def alone(family, side="left"):
    images, used = family.images(4), 0
    for text in TEXTS:
        count = text.count("<image>")
        yield family.inputs([text], images[used : used + count], side)
        used += count


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("settings", [PruningConfig(keep_ratio=0.25), PruningConfig(threshold=0.25)], ids=str)
def test_forward(family, pruned, side, settings):
    batch = family.inputs(TEXTS, family.images(4), side)
    tiles = pruned.model.family.tiles(pruned.model, batch)
    expected = {"llava": [1, 1, 1, 1], "llava_next": [2, 5, 4, 4], "llava_onevision": [2, 5, 1, 1]}
    assert tiles == expected[family.name]
    together = pruned(**batch, pruning=settings)
    for row, inputs in enumerate(alone(family)):
        expected = pruned(**inputs, pruning=settings).logits[0]
        count = int(together.prompt_mask[row].sum())
        got = together.logits[row, -count:] if side == "left" else together.logits[row, :count]
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("settings", [PruningConfig(keep_ratio=0.25), PruningConfig(threshold=0.25)], ids=str)
def test_generate(family, pruned, batch, settings):
    together = pruned.generate(**batch, **GREEDY, pruning=settings)
    for row, inputs in enumerate(alone(family)):
        expected = pruned.generate(**inputs, **GREEDY, pruning=settings)[0, inputs.input_ids.shape[1] :]
        assert torch.equal(together[row, batch.input_ids.shape[1] :][: len(expected)], expected)


def test_a_text_only_row_longer_than_the_pruned_ones(family, pruned):
    texts = ["<s>USER: <image>\nWhat? ASSISTANT:", "<s>USER: " + "a long story. " * 9 + "ASSISTANT:"]
    batch = family.inputs(texts, family.images(1))
    together = pruned.generate(**batch, **GREEDY)
    for row, text in enumerate(texts):
        inputs = family.inputs([text], family.images(1) if row == 0 else [])
        expected = pruned.generate(**inputs, **GREEDY)[0, inputs.input_ids.shape[1] :]
        assert torch.equal(together[row, batch.input_ids.shape[1] :][: len(expected)], expected)


def test_the_headless_model_compacts_as_the_full_one(pruned, batch):
    headless = pruned.model(**batch)
    torch.testing.assert_close(pruned.lm_head(headless.last_hidden_state), pruned(**batch).logits)
    assert len(headless.keep_masks) == 4 and headless.prompt_mask.shape == batch.input_ids.shape


def test_labels_come_back_compact_and_the_loss_is_theirs(pruned, batch):
    labels = batch.input_ids.masked_fill((batch.attention_mask == 0) | (batch.input_ids == tiny_checkpoint.IMAGE), -100)
    output = pruned(**batch, labels=labels)
    assert output.labels.shape == output.logits.shape[:2]
    for row in range(len(labels)):
        mask = output.prompt_mask[row]
        assert output.labels[row, -int(mask.sum()) :].tolist() == labels[row][mask].tolist()
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), output.labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


def test_logits_to_keep(pruned, one):
    full = pruned(**one)
    torch.testing.assert_close(pruned(**one, logits_to_keep=3).logits, full.logits[:, -3:])
    last = torch.tensor([one.input_ids.shape[1] - 4, one.input_ids.shape[1] - 1])
    torch.testing.assert_close(pruned(**one, logits_to_keep=last).logits, full.logits[:, [-4, -1]])
    dropped = (~full.prompt_mask[0]).nonzero()[0]
    with pytest.raises(ValueError, match="dropped or padded"):
        pruned(**one, logits_to_keep=dropped)


def test_position_ids_of_the_users_are_closed_up(pruned, batch):
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    torch.testing.assert_close(
        pruned(**batch, position_ids=positions).logits[0], pruned(**batch).logits[0], atol=2e-4, rtol=0
    )
    expected = pruned.generate(**batch, **GREEDY)
    assert torch.equal(pruned.generate(**batch, **GREEDY, position_ids=positions), expected)


def test_tuples(stock, pruned, one):
    assert torch.equal(pruned(**one, return_dict=False)[0], pruned(**one).logits)
    names = stock(**one).keys()
    assert len(pruned(**one, return_dict=False)) == len(names)
    tower_output = pruned.model.get_image_features(**visual(one), return_dict=False)
    assert isinstance(tower_output, tuple)
