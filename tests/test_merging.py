"""Merging: dropped tokens averaged into kept ones, as functions and through whole models."""

import numpy as np
import pytest
import torch

import small_families
from conftest import GREEDY, TEXTS, Oracle, encoded, visual
from transformers_rbl import PruningConfig
from transformers_rbl.evaluation.evaluate import prompt_inputs
from transformers_rbl.evaluation.questions import Question
from transformers_rbl.models.codebook import choose
from transformers_rbl.models.layout import BASE, NEWLINE, PATCH, VisualLayout
from transformers_rbl.models.merging import nearest_merging, places


MERGED = PruningConfig(keep_ratio=0.3, merge="nearest")


def literal(tokens, kept):
    """Kept tokens as averages, and how many tokens each stands for: a loop over tokens."""
    stay = [i for i, stays in enumerate(kept) if stays]
    groups = {i: [i] for i in stay}
    for i in range(len(tokens)):
        if i not in groups:
            cosines = [
                float(torch.cosine_similarity(tokens[i].detach().double(), tokens[j].detach().double(), dim=0))
                for j in stay
            ]
            groups[stay[int(np.argmax(cosines))]].append(i)
    return torch.stack([tokens[groups[i]].mean(0) for i in stay]), [len(groups[i]) for i in stay]


@pytest.mark.parametrize("count", [1, 2, 11, 30])
@pytest.mark.parametrize("kind", ["random", "zeros", "duplicates"])
def test_each_dropped_token_goes_to_the_nearest_and_the_sum_is_conserved(kind, count):
    tokens = torch.randn(30, 8, generator=torch.Generator().manual_seed(count))
    if kind == "zeros":
        tokens[::4] = 0
    kept = torch.zeros(30, dtype=torch.bool)
    kept[torch.randperm(30, generator=torch.Generator().manual_seed(1))[:count]] = True
    if kind == "duplicates":  # each dropped one equals a kept one, up to its length
        tokens[~kept] = 2 * tokens[kept][torch.arange(30 - count) % count]
    weights = nearest_merging(tokens, kept)
    expected, sizes = literal(tokens, kept)
    torch.testing.assert_close(weights @ tokens, expected)
    torch.testing.assert_close((1 / weights.amax(1)).round(), torch.tensor(sizes, dtype=torch.float))
    torch.testing.assert_close((weights @ tokens).T @ torch.tensor(sizes, dtype=torch.float), tokens.sum(0))
    assert torch.equal(weights, nearest_merging(tokens, kept, count))
    assert torch.equal(places(kept), places(kept, count))


def test_what_is_far_from_all_goes_to_the_first_and_ties_too():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    weights = nearest_merging(tokens, torch.tensor([True, False, True, False]))
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 1 / 3, 0, 1 / 3], [0, 0, 1, 0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_tokens_keep_their_dtype_and_the_rest_its_place(dtype):
    tokens = torch.randn(20, 16).to(dtype)
    rule = PruningConfig(keep_ratio=0.25, merge="nearest", score="random")
    choice, plain = (choose([{"tokens": tokens}], r)[0] for r in (rule, PruningConfig(keep_ratio=0.25, score="random")))
    assert torch.equal(choice.kept, plain.kept)
    merged = choice.merged(tokens)
    expected, _ = literal(tokens.float(), choice.kept)
    assert merged.dtype == dtype and merged.shape == tokens.shape
    torch.testing.assert_close(merged[choice.kept], expected.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(choice.merged(tokens), merged)


@pytest.mark.parametrize("settings", [{"keep_ratio": 1.0}, {"threshold": 1.1}])
def test_keeping_all_merges_nothing(settings):
    tokens = torch.randn(20, 16)
    rule = PruningConfig(**settings, merge="nearest", score="cls_similarity_low")
    choice = choose([{"tokens": tokens, "cls_similarity": torch.rand(20)}], rule)[0]
    assert choice.kept.all() and torch.equal(choice.merged(tokens), tokens)


def test_gradients_reach_the_tokens_that_were_merged():
    tokens = torch.randn(20, 16, requires_grad=True)
    layout = VisualLayout(torch.tensor([BASE] * 8 + ([PATCH] * 4 + [NEWLINE]) * 2 + [PATCH] * 2))
    scored = layout.kinds != NEWLINE
    rule = PruningConfig(keep_ratio=0.25, merge="nearest", score="random")
    choices = choose(layout.parts(tokens[scored], rule), rule)
    mask = layout.mask(choices, rule)
    stay = layout.stay(tokens, choices, mask, rule)
    expected, sizes = literal(tokens[scored].detach(), mask[scored])
    torch.testing.assert_close(stay[layout.kinds[mask] != NEWLINE], expected)
    assert torch.equal(stay[layout.kinds[mask] == NEWLINE], tokens[~scored])  # row ends are no patches
    stay.sum().backward()
    assert (tokens.grad > 0).all() and tokens.grad.sum() == pytest.approx(16 * int(mask.sum()), rel=1e-5)
    assert sum(sizes) == 18


def test_frames_merge_each_by_itself():
    tokens = torch.randn(3 * 10, 8)
    layout, rule = VisualLayout.of_patches(30, frames=3), PruningConfig(keep_ratio=0.3, merge="nearest", score="random")
    choices = choose(layout.parts(tokens, rule), rule)
    mask = layout.mask(choices, rule)
    frames = zip(tokens.split(10), mask.split(10))
    torch.testing.assert_close(
        layout.stay(tokens, choices, mask, rule), torch.cat([literal(frame, kept)[0] for frame, kept in frames])
    )


class MergingOracle(Oracle):
    """The stock language model on averages."""

    def features(self, inputs):
        """Kept tokens are replaced in place: masks stay what they are."""
        newline = getattr(self.stock.model, "image_newline", None)
        images = []
        for tokens in super().features(inputs):
            mask, tokens = self.keep(tokens, newline, MERGED), tokens.clone()
            patches = torch.tensor([newline is None or not torch.equal(token, newline) for token in tokens])
            tokens[mask & patches] = literal(tokens[patches], mask[patches])[0]
            images.append(tokens)
        return images

    def keep(self, tokens, newline, pruning):
        """Chosen once, before anything is merged: prompts have one image."""
        if self.chosen is None:
            self.chosen = super().keep(tokens, newline, pruning)
        return self.chosen


@pytest.fixture
def oracle(stock, family):
    made = MergingOracle(stock, family.codebook.prototypes)
    made.chosen = None
    return made


def test_a_model_merges_as_the_method_written_out(family, pruned, oracle):
    """Logits and generated ids, of one image a prompt."""
    for text, image in zip(TEXTS[:2], family.images(2)):
        oracle.chosen = None
        inputs = family.inputs([text], [image])
        expected, positions = oracle.logits(inputs, 0, MERGED)
        output = pruned(**inputs, pruning=MERGED)
        assert output.prompt_mask[0].nonzero()[:, 0].tolist() == positions
        torch.testing.assert_close(output.logits[0], expected, atol=2e-4, rtol=0)
        new = oracle.generate(inputs, 0, MERGED)
        sequences = pruned.generate(**inputs, **GREEDY, pruning=MERGED)
        assert sequences[0, inputs.input_ids.shape[1] :].tolist()[: len(new)] == new


def test_masks_and_lengths_are_those_without_merging_and_a_batch_is_its_rows(family, pruned, batch):
    merged, plain = pruned(**batch, pruning=MERGED), pruned(**batch)
    assert all(map(torch.equal, merged.keep_masks, plain.keep_masks))
    assert torch.equal(merged.prompt_mask, plain.prompt_mask)
    assert not torch.equal(encoded(merged), encoded(plain))
    images = family.images(4)
    for row, text in enumerate(TEXTS[:2]):
        single = pruned(**family.inputs([text], images[row : row + 1]), pruning=MERGED)
        torch.testing.assert_close(merged.logits[row, -1], single.logits[0, -1], atol=2e-4, rtol=0)


def test_base_images_alone_merge_their_own_tokens(family, pruned, one):
    rule = PruningConfig(keep_ratio=0.3, merge="nearest", tiles="base")
    base = pruned.get_image_features(**visual(one), pruning=rule, return_dict=True)
    whole = pruned.get_image_features(**visual(one), pruning=PruningConfig(enabled=False), return_dict=True)
    kinds = pruned.model.token_kinds(**visual(one))[0]
    scored = kinds == BASE if (kinds == BASE).any() else kinds != NEWLINE
    expected, _ = literal(whole.pooler_output[0][scored], base.keep_masks[0][scored])
    torch.testing.assert_close(base.pooler_output[0][: len(expected)], expected, atol=2e-4, rtol=0)


def test_deepstack_views_merge_alike(tmp_path):
    """Qwen3-VL's further views of the same tokens are averaged by the weights of the tokens."""
    family = small_families.family(tmp_path, "qwen3_vl")
    model, photo = family.pruned(keep_ratio=0.3), small_families.photos(1)[0]
    inputs = prompt_inputs(family.processor, Question([photo], "What is it?", []), "", model.device, model.dtype)
    grids = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    off = model.get_image_features(**grids, pruning=PruningConfig(enabled=False), return_dict=True)
    on = model.get_image_features(**grids, pruning=MERGED, return_dict=True)
    tokens, mask = torch.cat(list(off.pooler_output)), on.keep_masks[0]
    weights = nearest_merging(tokens.float(), mask)
    torch.testing.assert_close(on.pooler_output[0], weights @ tokens, atol=1e-5, rtol=0)
    assert len(on.deepstack_features) == len(off.deepstack_features) > 0
    for merged, view in zip(on.deepstack_features, off.deepstack_features):
        torch.testing.assert_close(merged[0], weights @ torch.cat(list(view)), atol=1e-5, rtol=0)
    assert model.generate(**inputs, **GREEDY, pruning=MERGED).shape[1] > inputs["input_ids"].shape[1]
