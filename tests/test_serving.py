"""What engines are told before they see an image, without an engine. With one: tests/engines."""

import itertools
import json
from importlib.metadata import entry_points

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModel

import small_families
import tiny_checkpoint
from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.integrations.served_positions import attach, detach, known_positions, offsets, runs_of
from transformers_rbl.integrations.serving import (
    ImageLayouts,
    kept_of_image,
    served_pruning,
    with_keep_ratio,
)
from transformers_rbl.models.auto_rbl import family_class
from transformers_rbl.models.layout import VisualLayout
from transformers_rbl.models.scorers import SCORERS, register_scorer


VIDEO, START, END = small_families.VIDEO, small_families.START, small_families.END
SERVED = [
    PruningConfig(keep_ratio=0.3),
    PruningConfig(keep_ratio=0.05, newlines="last", min_tokens=3),
    PruningConfig(keep_ratio=0.4, tiles="base"),
    PruningConfig(keep_ratio=0.4, tiles="base", newlines="last"),
    PruningConfig(keep_ratio=0.25, score="double_softmax"),
    PruningConfig(keep_ratio=0.5, score="random", seed=3),
    PruningConfig(keep_ratio=0.2, score="diversity"),
    PruningConfig(keep_ratio=0.2, score="codebook_dpp"),
    PruningConfig(keep_ratio=0.2, merge="nearest"),
    PruningConfig(keep_ratio=0.2, score="codebook_dpp"),
    PruningConfig(keep_ratio=1.0),
    PruningConfig(enabled=False),
]


@pytest.mark.parametrize("pruning", SERVED, ids=lambda p: json.dumps(p.to_dict())[:60])
def test_an_engine_keeps_what_transformers_keeps(family, pruned, pruning):
    layouts = ImageLayouts(pruned.config)
    for image in family.images(4):
        inputs = family.inputs(["<image>"], [image])
        named = ("pixel_values", "image_sizes") if family.has_tiles else ("pixel_values",)
        encode = {name: inputs[name] for name in named}
        ours = pruned.get_image_features(**encode, pruning=pruning, return_dict=True).pooler_output[0]
        whole = pruned.get_image_features(**encode, pruning=PruningConfig(enabled=False), return_dict=True)
        layout = layouts(image.height, image.width).encoded(pruning)
        tokens = whole.pooler_output[0]
        if len(layout) < len(tokens):  # the base image alone, with the row end that engines append
            tokens = torch.cat([tokens[: len(layout) - 1], tokens[-1:]])
        kept, mask = kept_of_image(tokens, layout, pruning, pruned.codebook)
        torch.testing.assert_close(kept, ours, rtol=0, atol=2e-4)  # base images alone are another batch
        assert len(kept) == int(mask.sum()) == layout.kept_count(pruning)


@given(width=st.integers(8, 400), height=st.integers(8, 400))
@settings(max_examples=15, deadline=None)
def test_the_layout_of_any_image_is_that_of_the_prompt(family, pruned, width, height):
    if not 1 / 12 < width / height < 12:
        return
    placeholders = family.inputs(["<image>"], [Image.new("RGB", (width, height))]).input_ids == tiny_checkpoint.IMAGE
    assert len(ImageLayouts(pruned.config)(height, width)) == int(placeholders.sum())


def refusal(config, **pruning):
    config.pruning = pruning
    with pytest.raises(ValueError) as error:
        served_pruning(config)
    return str(error.value)


def test_settings_whose_count_depends_on_the_image_are_refused_with_the_way_out(family, pruned):
    config = type(pruned.config).from_dict(pruned.config.to_dict())
    message = refusal(config, threshold=0.7)
    assert "rbl calibrate" in message and "--hf-overrides" in message and "image_embeds" in message
    assert 'newlines="last"' not in message and 'newlines="row"' in refusal(config, keep_ratio=0.2, newlines="row")
    assert "[cls]" in refusal(config, keep_ratio=0.2, score="cls_similarity_low")
    for score in ("cls_attention", "scope", "vispruner"):
        assert "needs cls_attention of the vision tower" in refusal(config, keep_ratio=0.2, score=score)
    assert "reads the question" in refusal(config, keep_ratio=0.2, score="cdpruner")
    assert "depends on the video" in refusal(config, keep_ratio=0.2, frames="where_needed")
    assert "numbers tokens one after the other" in refusal(config, keep_ratio=0.2, keep_positions=True)
    assert "Unknown pruning setting" in refusal(config, keep_ratio=0.2, colour="red")
    config.num_prototypes = None
    assert "holds no codebook" in refusal(config, keep_ratio=0.2)
    config.pruning = {"keep_ratio": 0.2, "score": "random"}
    assert served_pruning(config).keep_ratio == 0.2
    config.pruning = None
    assert not served_pruning(config).enabled


def test_a_pixtral_tower_is_refused(pruned):
    config = type(pruned.config).from_dict(pruned.config.to_dict())
    config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match="Pixtral"):
        served_pruning(config)


def test_a_request_may_ask_for_less_but_not_for_more():
    pruning = PruningConfig(keep_ratio=0.2, newlines="last")
    assert with_keep_ratio(pruning, None) is pruning
    assert with_keep_ratio(pruning, 0.1) == PruningConfig(keep_ratio=0.1, newlines="last")
    for ratio, words in ((0.3, "reserved memory"), (0, "in \\(0, 1\\]"), ("0.1", "must be a number")):
        with pytest.raises(ValueError, match=words):
            with_keep_ratio(pruning, ratio)
    with pytest.raises(ValueError, match="does not prune"):
        with_keep_ratio(PruningConfig(enabled=False), 0.1)


def test_features_of_another_layout_are_refused():
    with pytest.raises(ValueError, match="9 visual tokens where 8"):
        kept_of_image(
            torch.randn(9, 4),
            VisualLayout.of_patches(8),
            PruningConfig(keep_ratio=0.5),
            RedundancyCodebook(torch.randn(2, 4)),
        )


def test_vllm_finds_the_plugin():
    found = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    assert found["transformers_rbl"] == "transformers_rbl.integrations.vllm:register"


def pruned_prompt(times: list[int], grid: tuple[int, int], timestamps: bool, keep: list[list[int]]):
    """A prompt of ids with a video between words, whole and pruned: ids, mask of what stays, runs as an engine sees
    them. `keep` names the tokens that stay of each frame."""
    tokens = grid[0] * grid[1]
    frames = [[VIDEO if place in kept else -VIDEO for place in range(tokens)] for kept in keep]
    if timestamps:
        video = [token for number, frame in enumerate(frames) for token in (30 + number, START, *frame, END)]
    else:
        video = [START, *itertools.chain(*frames), END]
    marked = [20, 21, 22, *video, 23, 24]
    pruned = [token for token in marked if token > 0]
    start, visual = 3, torch.tensor([token == VIDEO for token in pruned[3:-2]])
    return [abs(token) for token in marked], torch.tensor(marked) > 0, runs_of(start, visual, times, grid)


@pytest.mark.parametrize("name, timestamps", [("qwen2_5_vl", False), ("qwen3_vl", True)])
@pytest.mark.parametrize("frames, seconds", [(1, 1.0), (3, 1.0), (4, 0.6)])
def test_positions_of_an_engine_are_those_of_the_unpruned_prompt(name, timestamps, frames, seconds):
    config = small_families._config(name)
    config.video_token_id, config.vision_start_token_id, config.vision_end_token_id = VIDEO, START, END
    with torch.device("meta"):
        stock = AutoModel.from_config(config)
    config.vision_config.tokens_per_second = 2
    times = [0] * frames if timestamps else [int(frame * 2 * seconds) for frame in range(frames)]
    random = np.random.default_rng(frames)
    keep = [sorted(random.choice(15, 4, replace=False)) for _ in range(frames)]
    ids, stays, runs = pruned_prompt(times, (3, 5), timestamps, keep)
    ids = torch.tensor([ids])
    whole, _ = stock.get_rope_index(
        ids,
        mm_token_type_ids=2 * (ids == VIDEO).int(),
        video_grid_thw=torch.tensor([[frames, 6, 10]]),
        second_per_grid_ts=torch.tensor([seconds]),
        attention_mask=torch.ones_like(ids),
    )
    wanted = whole[:, 0, stays]
    found = known_positions(int(stays.sum()), runs)
    assert torch.equal(found[0], wanted[0])
    visual = ids[0, stays] == VIDEO
    tokens = torch.randn(int(visual.sum()), 8, dtype=torch.bfloat16)
    mask = torch.tensor([place in kept for kept in keep for place in range(15)])
    carried, places = detach(attach(tokens, offsets(times, (3, 5))[mask]))
    found[1:, visual] += places.T
    assert torch.equal(carried, tokens) and torch.equal(found, wanted)


def test_text_follows_a_long_video_where_vllm_and_qwens_own_code_put_it():
    """After its last moment; transformers 5 goes on after its rows or columns, in the midst of its time."""
    _, stays, runs = pruned_prompt([0, 14, 28], (3, 5), False, [[0, 14]] * 3)
    assert known_positions(int(stays.sum()), runs)[0].tolist() == [0, 1, 2, 3, 4, 4, 18, 18, 32, 32, 33, 34, 35]


def test_offsets_of_any_size_survive_half_precision():
    places = torch.tensor([[0, 0], [127, 128], [1810, 9], [-4096, 3], [16383, -16383]])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(detach(attach(torch.randn(5, 3, dtype=dtype), places))[1], places)


def asked(tokens: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
    return tokens @ question.mean(0)


def test_a_rule_that_reads_the_question_is_refused(pruned):
    register_scorer("served_question", asked)
    try:
        config = type(pruned.config).from_dict(pruned.config.to_dict())
        assert "reads the question" in refusal(config, keep_ratio=0.2, score="served_question")
    finally:
        SCORERS.pop("served_question")


def test_other_views_of_the_tokens_are_merged_as_they_are():
    """Deepstack's channels beside the tokens: chosen and merged by the tokens alone."""
    tokens, view = torch.randn(12, 8), torch.randn(12, 8)
    pruning, layout = PruningConfig(keep_ratio=0.25, score="diversity", merge="nearest"), VisualLayout.of_patches(12)
    kept, mask = kept_of_image(torch.cat([tokens, view], dim=-1), layout, pruning, None, width=8)
    alone, mask_alone = kept_of_image(tokens, layout, pruning, None)
    assert torch.equal(mask, mask_alone) and int(mask.sum()) == 3
    torch.testing.assert_close(kept[:, :8], alone)
    assert not torch.allclose(kept[:, 8:], view[mask])


def test_the_tiles_of_internvl_share_a_budget_and_the_last_is_the_thumbnail():
    config = family_class("internvl").config_class(**small_families._config("internvl").to_dict())
    config.num_prototypes = 4
    config.pruning = {"keep_ratio": 0.2}
    assert ImageLayouts(config).of_tiles(5 * 16).kept_count(served_pruning(config)) == 16
    config.pruning = {"keep_ratio": 0.5, "tiles": "base"}
    layout, pruning = ImageLayouts(config).of_tiles(5 * 16), served_pruning(config)
    assert layout.kept_count(pruning) == 8
    kept, mask = kept_of_image(torch.randn(80, 8), layout, pruning, RedundancyCodebook(torch.randn(4, 8)))
    assert len(kept) == 8 and int(mask[-16:].sum()) == 8
    assert ImageLayouts(config).of_tiles(16).kept_count(pruning) == 8  # a single tile is the whole image


def test_the_tiles_of_a_family_without_runs_are_not_one_image(pruned):
    with pytest.raises(ValueError, match="do not share a budget"):
        ImageLayouts(pruned.config).of_tiles(32)
