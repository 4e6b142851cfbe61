"""Contracts 1 to 3: off is stock, keep-all is stock, and a pruned language model really sees fewer tokens."""

import pytest
import torch

import tiny_checkpoint
from conftest import GREEDY, TEXTS, encoded, visual
from transformers_rbl import PruningConfig
from transformers_rbl.models.layout import BASE, NEWLINE, PATCH


OFF, ALL = PruningConfig(enabled=False), PruningConfig(keep_ratio=1.0)


def training_step(model, inputs, **kwargs):
    model.zero_grad()
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    output = model(**inputs, labels=labels, **kwargs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [None, OFF])
def test_off_is_stock_bit_for_bit(family, stock, batch, settings):
    model = family.pruned(keep_ratio=None, pruning=OFF) if settings is None else family.pruned()
    ours, ours_grads = training_step(model, batch, pruning=settings)
    theirs, their_grads = training_step(stock, batch)
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.logits, theirs.logits)
    assert ours_grads.keys() == their_grads.keys()
    assert all(torch.equal(ours_grads[name], their_grads[name]) for name in their_grads)
    assert torch.equal(model.generate(**batch, **GREEDY, pruning=settings), stock.generate(**batch, **GREEDY))
    stock.zero_grad()


def test_a_stock_checkpoint_without_settings_is_stock(family, stock, batch):
    model = family.rbl_class.from_pretrained(family.folder).eval()
    assert model.codebook is None and model.pruning is None
    assert torch.equal(model.generate(**batch, **GREEDY), stock.generate(**batch, **GREEDY))
    with pytest.raises(ValueError, match="no codebook"):
        model.generate(**batch, **GREEDY, pruning=ALL)


@pytest.mark.parametrize("settings", [ALL, PruningConfig(threshold=1.5)])
def test_keep_all_is_stock(stock, pruned, batch, settings):
    ours, theirs = pruned(**batch, pruning=settings), stock(**batch)
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.prompt_mask.all() and all(mask.all() for mask in ours.keep_masks)
    assert torch.equal(pruned.generate(**batch, **GREEDY, pruning=settings), stock.generate(**batch, **GREEDY))


SETTINGS = [
    PruningConfig(keep_ratio=0.3),
    PruningConfig(keep_ratio=0.05, min_tokens=3),
    PruningConfig(threshold=0.3),
    PruningConfig(threshold=-1.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_row_equals_the_method_written_out(pruned, oracle, batch, settings):
    output = pruned(**batch, pruning=settings)
    for row in range(len(TEXTS)):
        logits, positions = oracle.logits(batch, row, settings)
        assert output.prompt_mask[row].nonzero()[:, 0].tolist() == positions
        torch.testing.assert_close(output.logits[row, -len(positions) :], logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_generation_equals_the_method_written_out(pruned, oracle, batch, settings):
    sequences = pruned.generate(**batch, **GREEDY, pruning=settings)
    for row in range(len(TEXTS)):
        expected = oracle.generate(batch, row, settings)
        assert sequences[row, batch.input_ids.shape[1] :][: len(expected)].tolist() == expected


def test_the_language_model_sees_and_caches_fewer_tokens(pruned, batch):
    seen = []
    hook = pruned.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    output = pruned.generate(**batch, **GREEDY, return_dict_in_generate=True)
    hook.remove()
    kept = [int(mask.sum()) for mask in output.keep_masks]
    dropped = [len(mask) - k for mask, k in zip(output.keep_masks, kept)]
    text = batch.attention_mask.sum(1)
    per_row = text - torch.tensor([dropped[0], dropped[1], dropped[2] + dropped[3], 0])
    prefill = seen[0]
    assert prefill["inputs_embeds"].shape[1] == per_row.max()
    assert prefill["attention_mask"].sum(1).tolist() == per_row.tolist() == output.prompt_mask.sum(1).tolist()
    for row, count in enumerate(per_row):  # consecutive, from 0, padding aside
        assert prefill["position_ids"][row, -count:].tolist() == list(range(count))
    assert output.past_key_values.get_seq_length() == per_row.max() + output.sequences.shape[1] - text.max() - 1


@pytest.mark.parametrize("newlines", ["all", "row", "last"])
@pytest.mark.parametrize("tiles", ["all", "base"])
def test_newline_and_tile_policies(family, pruned, batch, newlines, tiles):
    settings = PruningConfig(keep_ratio=0.2, newlines=newlines, tiles=tiles)
    output = pruned(**batch, pruning=settings)
    kinds = pruned.model.token_kinds(**batch)
    base = 16  # a 4 x 4 grid
    for mask, kind in zip(output.keep_masks, kinds, strict=True):
        has_tiles = bool((kind == BASE).any())
        patches, rows = int((kind != NEWLINE).sum()), int((kind == NEWLINE).sum())
        scored = patches if tiles == "all" else base
        kept_patches = int((mask & (kind != NEWLINE)).sum())
        kept_rows = int((mask & (kind == NEWLINE)).sum())
        assert kept_patches == round(scored * 0.2)
        assert not mask[base:][kind[base:] == PATCH].any() or tiles == "all"
        if rows == 0:
            assert family.name == "llava"
        elif newlines == "last" or not has_tiles:
            assert kept_rows == 1 and mask[-1]
        elif tiles == "base":
            assert kept_rows == 0
        else:
            assert kept_rows == rows if newlines == "all" else kept_rows <= rows
    assert sum(len(kind) for kind in kinds) == (batch.input_ids == tiny_checkpoint.IMAGE).sum()
    masked = torch.cat(output.keep_masks).sum() + (batch.attention_mask.bool() & (batch.input_ids != 3)).sum()
    assert output.prompt_mask.sum() == masked


def test_base_tiles_skip_the_vision_tower(family, pruned, batch):
    counts = []
    hook = pruned.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    base = pruned(**batch, pruning=PruningConfig(keep_ratio=0.5, tiles="base"))
    pruned(**batch, pruning=PruningConfig(keep_ratio=0.5))
    hook.remove()
    assert counts[0] == 4 and (counts[1] > 4) == family.has_tiles
    whole = pruned.model.get_image_features(**visual(batch), pruning=ALL).pooler_output
    assert torch.allclose(encoded(base)[:8], whole[0][:16][base.keep_masks[0][:16]], atol=1e-5)


def test_images_as_one_list_of_tiles(family, pruned, batch):
    """Stock takes pixel values of shape (tiles of all images, 3, height, width) too."""
    if not family.has_tiles:
        pytest.skip("LLaVA-1.5 has no tiles")
    tiles = pruned.model.family.tiles(pruned.model, batch)
    flat = torch.cat([pixels[:count] for pixels, count in zip(batch.pixel_values, tiles)])
    for settings in (PruningConfig(keep_ratio=0.4), PruningConfig(keep_ratio=0.4, tiles="base")):
        expected = pruned(**batch, pruning=settings).logits
        assert torch.equal(pruned(**{**batch, "pixel_values": flat}, pruning=settings).logits, expected)


def test_scores_and_kept_sets_do_not_depend_on_autocast(pruned, one):
    tokens = torch.randn(50, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pruned.codebook.score(tokens)
    assert inside.dtype == torch.float32 and torch.equal(inside, pruned.codebook.score(tokens))
