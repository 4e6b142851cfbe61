"""Scores, selection and settings: the pure functions against loops written out."""

import math

import pytest
import torch

from transformers_rbl import PruningConfig, kept_token_count
from transformers_rbl.models.layout import BASE, NEWLINE, PATCH, VisualLayout, keep_newlines
from transformers_rbl.models.pruning import select_tokens
from transformers_rbl.models.scorers import max_cosine


def unit(prototypes):
    return torch.nn.functional.normalize(prototypes, dim=-1)


@pytest.mark.parametrize("block_elements", [1, 50, 2**24])
def test_max_cosine_is_the_largest_cosine_whatever_the_block(block_elements):
    tokens, prototypes = torch.randn(23, 9), torch.randn(5, 9) * 7
    expected = [max(float(torch.cosine_similarity(t, p, dim=0)) for p in prototypes) for t in tokens]
    scores = max_cosine(tokens, unit(prototypes), block_elements)
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_max_cosine_ignores_length_order_and_zero_tokens():
    tokens, prototypes = torch.randn(11, 6), torch.randn(8, 6)
    scores = max_cosine(tokens, unit(prototypes))
    torch.testing.assert_close(max_cosine(tokens * 1e3, unit(prototypes)), scores)
    torch.testing.assert_close(max_cosine(tokens, unit(prototypes[torch.randperm(8)])), scores)
    assert max_cosine(torch.zeros(1, 6), unit(prototypes)).item() == 0


@pytest.mark.parametrize(
    ("tokens", "ratio", "minimum", "kept"),
    [(576, 0.11, 1, 63), (576, 1.0, 1, 576), (10, 0.001, 1, 1), (10, 0.001, 4, 4), (3, 0.5, 9, 3), (0, 0.5, 1, 0)],
)
def test_kept_token_count(tokens, ratio, minimum, kept):
    assert kept_token_count(tokens, ratio, minimum) == kept


@pytest.mark.parametrize("ratio", [0.01, 0.11, 0.5, 0.97, 1.0])
def test_ratio_keeps_exactly_the_lowest(ratio):
    scores = torch.randn(100)
    kept = select_tokens(scores, PruningConfig(keep_ratio=ratio))
    assert kept.sum() == kept_token_count(100, ratio)
    assert kept.all() or scores[kept].max() < scores[~kept].min()


def test_ties_keep_the_earlier_token():
    scores = torch.tensor([0.5, 0.1, 0.5, 0.5, 0.5])
    assert select_tokens(scores, PruningConfig(keep_ratio=0.6)).tolist() == [True, True, True, False, False]


def test_threshold_keeps_what_is_strictly_below():
    scores = torch.tensor([0.2, 0.3, 0.4])
    assert select_tokens(scores, PruningConfig(threshold=0.3)).tolist() == [True, False, False]
    assert select_tokens(scores, PruningConfig(threshold=1.5)).all()


def test_threshold_never_empties_an_image():
    scores = torch.tensor([0.9, 0.7, 0.8])
    assert select_tokens(scores, PruningConfig(threshold=-1.0)).tolist() == [False, True, False]
    assert select_tokens(scores, PruningConfig(threshold=-1.0, min_tokens=2)).tolist() == [False, True, True]
    assert select_tokens(scores, PruningConfig(threshold=-1.0, min_tokens=9)).all()


@pytest.mark.parametrize("setting", [{"keep_ratio": 0.34}, {"threshold": 0.0}])
def test_nan_tokens_stay_so_that_an_overflow_shows(setting):
    assert select_tokens(torch.tensor([0.9, math.nan, 0.8]), PruningConfig(**setting))[1]


def test_newline_policies():
    kinds = torch.tensor([BASE, BASE, PATCH, PATCH, NEWLINE, PATCH, PATCH, NEWLINE])
    kept = torch.tensor([True, False, False, False, False, False, True, False])
    expected = {"all": [4, 7], "row": [7], "last": [7]}
    for policy, positions in expected.items():
        assert keep_newlines(kept, kinds, policy).nonzero()[:, 0].tolist() == positions
    kept = torch.tensor([True, False, True, False, False, False, False, False])
    assert keep_newlines(kept, kinds, "row").nonzero()[:, 0].tolist() == [4]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "exactly one"),
        ({"keep_ratio": 0.5, "threshold": 0.5}, "exactly one"),
        ({"keep_ratio": 0}, "in \\(0, 1\\]"),
        ({"keep_ratio": 1.5}, "in \\(0, 1\\]"),
        ({"keep_ratio": "0.5"}, "must be a number"),
        ({"keep_ratio": True}, "must be a number"),
        ({"keep_ratio": math.nan}, "in \\(0, 1\\]"),
        ({"threshold": math.inf}, "finite"),
        ({"keep_ratio": 0.5, "min_tokens": 0}, "at least 1"),
        ({"keep_ratio": 0.5, "min_tokens": 1.5}, "integer"),
        ({"keep_ratio": 0.5, "score": "norm"}, "score must be one of"),
        ({"keep_ratio": 0.5, "merge": "mean"}, "merge must be one of none, nearest; got 'mean'"),
        ({"keep_ratio": 0.5, "newlines": "none"}, "newlines must be one of"),
        ({"keep_ratio": 0.5, "tiles": "some"}, "tiles must be one of"),
        ({"keep_ratio": 0.5, "frames": "some"}, "frames must be one of all, where_needed"),
        ({"threshold": 0.5, "frames": "where_needed"}, "a threshold has none: give keep_ratio"),
        ({"keep_ratio": 0.5, "enabled": 1}, "True or False"),
    ],
)
def test_bad_settings_get_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        PruningConfig(**settings)


def test_settings_survive_a_dict_and_unknown_keys_raise():
    settings = PruningConfig(
        threshold=0.4, newlines="row", tiles="base", min_tokens=3, per_frame=False, merge="nearest"
    )
    assert PruningConfig.from_dict(settings.to_dict()) == settings
    with pytest.raises(ValueError, match="keepratio.*newer version"):
        PruningConfig.from_dict({"keepratio": 0.5})
    PruningConfig(enabled=False)


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 1.0])
def test_a_layouts_count_in_advance_is_what_it_keeps(per_frame, ratio):
    """Of a video of three frames, and of an image with a base image, two tiles and row ends."""
    video = VisualLayout.of_patches(3 * 7, frames=3)
    image = VisualLayout(torch.tensor([BASE] * 4 + ([PATCH] * 4 + [NEWLINE]) * 2))
    for layout in (video, image):
        for newlines, tiles in (("all", "all"), ("last", "all"), ("all", "base"), ("last", "base")):
            rule = PruningConfig(
                keep_ratio=ratio, per_frame=per_frame, score="random", newlines=newlines, tiles=tiles, min_tokens=2
            )
            kept = layout.keep(torch.randn(int(layout.scored(rule).sum()), 4), rule)
            assert layout.kept_count(rule) == int(kept.sum()) == layout.encoded(rule).kept_count(rule)
