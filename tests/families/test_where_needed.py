"""`tiles="where_needed"`: a tile is encoded only where the thumbnail keeps a token."""

from __future__ import annotations

import functools

import pytest
import torch

from transformers_rbl import PruningConfig
from transformers_rbl.models.layout import BASE, NEWLINE, PATCH, VisualLayout
from transformers_rbl.models.needed import LOOK, encoded_alone, looking, needed_tiles

from .conftest import OFF
from .test_tower import rows_encoded
from .tiny import words


FAMILIES = ("llava_next", "llava_next_video", "llava_onevision")


def rule(**settings) -> PruningConfig:
    return PruningConfig(**{"keep_ratio": 0.15, "tiles": "where_needed"} | settings)


def two_by_two() -> tuple[VisualLayout, torch.Tensor]:
    """A thumbnail of 4 x 4 tokens, and four tiles of as many, rows of which end with a mark."""
    patches = torch.arange(64).view(8, 8)
    tile = (1 + 2 * (patches // 8 // 4) + patches % 8 // 4).tolist()
    kinds, tiles = [BASE] * 16, [0] * 16
    for row in tile:
        kinds += [PATCH] * 8 + [NEWLINE]
        tiles += [*row, -1]
    shares = torch.zeros(len(tiles), 5)
    for place, number in enumerate(tiles):
        if number >= 0:
            shares[place, number] = 1
    return VisualLayout(torch.tensor(kinds), grid=(4, 4)), shares


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([(0, 0)], [1]),
        ([(1, 2)], [2]),
        ([(2, 1), (3, 0)], [3]),
        ([(0, 3), (3, 3)], [2, 4]),
        ([(0, 0), (0, 2), (2, 0), (2, 2)], [1, 2, 3, 4]),
    ],
)
def test_a_tile_is_needed_where_its_region_of_the_thumbnail_keeps_a_token(cells, expected):
    layout, shares = two_by_two()
    kept = torch.zeros(4, 4, dtype=torch.bool)
    for row, column in cells:
        kept[row, column] = True
    needed = needed_tiles(kept.flatten(), layout, shares, count=12)
    assert [tile for tile, is_needed in enumerate(needed) if is_needed] == [0, *expected]
    there = encoded_alone(layout, shares, needed)
    assert there.numbers_scored == 16 + 16 * len(expected)


def test_more_tiles_are_encoded_where_their_tokens_are_to_stay():
    layout, shares = two_by_two()
    kept = torch.zeros(16, dtype=torch.bool)
    kept[0] = True
    for count, tiles in ((32, 1), (33, 2), (64, 3), (80, 4)):
        assert sum(needed_tiles(kept, layout, shares, count)) == 1 + tiles


def test_the_thumbnail_is_looked_at_with_more_than_a_small_share():
    assert looking(rule(keep_ratio=0.05)) == rule(keep_ratio=LOOK, tiles="base")
    assert looking(rule(keep_ratio=0.6)) == rule(keep_ratio=0.6, tiles="base")
    assert looking(rule(keep_ratio=None, threshold=0.4)) == rule(keep_ratio=LOOK, tiles="base")


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("by", ["keep_ratio", "small threshold", "large threshold"])
def test_a_tile_is_encoded_where_the_thumbnail_keeps_a_token_as_it_is_looked_at(kits, name: str, by: str):
    """From the thumbnail's own tokens and their scores, written out; at a small share itself fewer tiles would be."""
    kit, more = kits(name), 0
    headless, family = kit.model.base_model, kit.model.base_model.family
    for picture in kit.pictures:
        inputs = kit.inputs([words(2), picture])
        visual = {key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images") if key in inputs}
        [layout], [share] = headless.layouts(**visual), family.tile_shares(headless, family.on_host(visual))
        tokens = headless.get_image_features(**visual, pruning=OFF, return_dict=True).pooler_output[0]
        scores = kit.codebook.score(tokens[layout.kinds == BASE])
        ranked, count = scores.argsort(stable=True), 10 if by == "large threshold" else 1
        settings = rule(keep_ratio=count / len(scores))
        if by != "keep_ratio":
            settings = rule(keep_ratio=None, threshold=float(scores[ranked[count - 1 : count + 1]].mean()))
        tiles = []
        for looked in (1, max(count, round(LOOK * len(scores)))):
            kept = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, ranked[:looked], True)
            tiles.append(sum(needed_tiles(kept, layout, share, settings.count_of(layout.numbers_scored))))
        encode = functools.partial(headless.get_image_features, **visual, pruning=settings)
        assert rows_encoded(kit.model, encode) == tiles[1]
        more += tiles[1] - tiles[0]
    assert more > 0


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_of_other_tiles_leave_and_the_number_stays(kits, name: str):
    kit = kits(name)
    model, inputs = kit.model, kit.inputs(kit.one, kit.two)
    answers = []
    rows = rows_encoded(model, lambda: answers.append(model(**inputs, pruning=rule())))
    whole = rows_encoded(model, lambda: answers.append(model(**inputs, pruning=rule(tiles="all"))))
    assert rows < whole
    needed, everything = answers
    assert [int(mask.sum()) for mask in needed.keep_masks] == [int(mask.sum()) for mask in everything.keep_masks]
    visual = {key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images") if key in inputs}
    layouts, headless = model.base_model.layouts(**visual), model.base_model
    assert [layout.kept_count(rule()) for layout in layouts] == [int(mask.sum()) for mask in needed.keep_masks]
    shares = headless.family.tile_shares(headless, headless.family.on_host(visual))
    encoded = 0
    for layout, mask, share in zip(layouts, needed.keep_masks, shares):
        used = share[mask & (layout.kinds == PATCH)].sum(0) > 0
        encoded += len(used)
    assert encoded >= rows


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_where_all_tiles_are_needed_nothing_changes(kits, name: str):
    kit = kits(name)
    inputs = kit.inputs(kit.two)
    needed = kit.model(**inputs, pruning=rule(keep_ratio=1.0))
    stock = kit.model(**inputs, pruning=OFF)
    torch.testing.assert_close(needed.logits, stock.logits, atol=2e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_single_and_features_pruned_later_are_the_same(kits, name: str):
    kit = kits(name)
    together = kit.model(**kit.inputs(kit.one, kit.two), pruning=rule()).keep_masks
    apart = [kit.model(**kit.inputs(prompt), pruning=rule()).keep_masks for prompt in (kit.one, kit.two)]
    assert all(torch.equal(a, b) for a, b in zip(together, [mask for masks in apart for mask in masks]))
    inputs = kit.inputs(kit.one)
    visual = {key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images") if key in inputs}
    encoded = kit.model.base_model.get_image_features(**visual, pruning=OFF, return_dict=True)
    later = kit.model.base_model.prune_image_features(encoded, rule(), **visual)
    assert torch.equal(later.keep_masks[0], apart[0][0])
    now = kit.model.base_model.get_image_features(**visual, pruning=rule())
    torch.testing.assert_close(later.pooler_output[0], now.pooler_output[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_it_generates(kits):
    kit = kits("llava_next")
    inputs = kit.inputs(kit.one)
    ids = kit.model.generate(**inputs, max_new_tokens=3, do_sample=False, pruning=rule())
    assert torch.equal(ids[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_other_families_and_towers_refuse(kits, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="where_needed' is not to be had with llava models"):
        kits("llava").model(**kits("llava").inputs(kits("llava").one), pruning=rule())
    kit = kits("llava_next")
    monkeypatch.setitem(vars(kit.model.base_model.vision_tower), "forward", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="needs a CLIP or SigLIP tower"):
        kit.model(**kit.inputs(kit.one), pruning=rule())
