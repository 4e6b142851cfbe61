"""`frames="where_needed"`: a video's frame is encoded only where its pixels are new."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transformers_rbl import PruningConfig
from transformers_rbl.models.layout import VisualLayout
from transformers_rbl.models.needed import FRAME_CHANGE, in_patches, new_frames
from transformers_rbl.models.seam import MASKS, PIXELS, TOKENS, VIEWS, replaced

from .conftest import OFF, Kit, same
from .test_no_waiting import called
from .test_tower import encoder_of
from .tiny import CASES, END, START, VIDEO, Picture, Prompt, words


GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v")
FAMILIES = [
    "llava_onevision",
    "llava_next_video",
    *(pytest.param(name, marks=() if CASES[name].core else pytest.mark.slow) for name in GRIDS),
]
SHOWN = [0, 0, 1, 1, 1, 0]  # which scene each frame shows: three stretches
NEW = [0, 2, 5]


def rule(**settings: Any) -> PruningConfig:
    return PruningConfig(**{"keep_ratio": 0.3, "frames": "where_needed"} | settings)


def movie(kit: Kit, seed: int = 0, shown: list[int] = SHOWN) -> Picture:
    """A video of `shown` scenes, with a camera's noise."""
    torch.manual_seed(seed)
    if kit.case.video is not None:
        return still(kit.case.video(len(shown), (2, 3), torch.randn), kit, shown)
    count = len(shown)
    side = kit.model.config.vision_config.image_size
    tokens = kit.model.base_model.layouts("video", pixel_values_videos=torch.zeros(1, 1, 3, side, side))[0]
    length = tokens.numbers_scored * count
    pixels = {PIXELS["video"]: torch.randn(1, count, 3, side, side)}
    ids = [START, *[VIDEO] * (length + 1), END]
    return still(Picture(ids, pixels, [length], frozenset({length}), "video", VIDEO), kit, shown)


def still(picture: Picture, kit: Kit, shown: list[int]) -> Picture:
    pixels = picture.tensors[PIXELS["video"]]
    frames = pixels[0] if pixels.ndim == 5 else pixels.unflatten(0, (len(shown), -1))
    frames.copy_(frames[shown] + FRAME_CHANGE / 5 * torch.randn(frames.shape))
    return picture


def film(kit: Kit, seed: int = 0, shown: list[int] = SHOWN) -> Prompt:
    return [words(4 + seed, seed), movie(kit, seed, shown), words(5, 1)]


def visual(kit: Kit, *prompts: Prompt) -> dict[str, torch.Tensor]:
    """Arguments of `get_video_features`."""
    inputs = kit.case.visual(list(prompts))
    return {name: inputs[name] for name in (PIXELS["video"], "video_grid_thw") if name in inputs}


def encoded(kit: Kit, call: Any) -> int:
    """Tokens that pass the tower's first layer."""
    base, seen = kit.model.base_model, []
    layer = base.visual.blocks[0] if hasattr(base, "visual") else encoder_of(kit.model).layers[0]
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    try:
        call()
    finally:
        hook.remove()
    return sum(seen)


def test_a_frame_is_new_where_one_of_its_patches_is():
    torch.manual_seed(0)
    image = torch.randn(3, 28, 28)
    video = image.repeat(7, 1, 1, 1)
    video[1] += FRAME_CHANGE / 2 * torch.randn(image.shape)  # noise everywhere
    video[2, :, 14:21, 7:14] += 1.2 * FRAME_CHANGE  # one patch of 16
    video[3:] = video[2]
    for step in range(4, 7):  # it fades, each time by less than makes a frame new
        video[step] = video[step - 1] + 0.7 * FRAME_CHANGE
    assert new_frames(in_patches(video, 7)).tolist() == [True, False, True, False, False, True, False]
    assert new_frames(in_patches(video, 28)).tolist() == [True, False, False, False, False, True, False]
    video[6, 0, 0, 0] = torch.nan
    assert new_frames(in_patches(video, 7).bfloat16()).tolist() == [True, False, True, False, False, True, True]


def test_patches_are_whole_squares_of_all_channels():
    frames = torch.arange(2 * 3 * 9 * 10).view(2, 3, 9, 10)
    patches = in_patches(frames, 4)  # what is less than a patch, the tower does not see either
    assert patches.shape == (2, 4, 48)
    assert torch.equal(patches[1, 2], frames[1, :, 4:8, :4].flatten())


def test_tokens_of_frames_are_found_beside_row_ends():
    layout = VisualLayout(torch.tensor([1, 1, 1, 1, 1, 1, 2]), frames=3)
    assert layout.of_frames([True, False, True]).tolist() == [True, True, False, False, True, True, True]
    assert layout.of_frames([False, True, False]).tolist() == [False, False, True, True, False, False, True]


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_masks_are_of_the_tokens_where_a_video_ends_in_a_stretch(kits, name: str):
    kit = kits(name)
    inputs = visual(kit, film(kit, 1, [0, 1, 2, 3, 3, 3]))
    every = kit.model.base_model.get_video_features(**inputs, pruning=OFF)[TOKENS]
    output = kit.model.base_model.get_video_features(**inputs, pruning=rule())
    [mask] = output[MASKS["video"]]
    assert len(mask) == sum(entry.flatten(0, -2).shape[0] for entry in every)
    assert int(mask.sum()) == sum(entry.flatten(0, -2).shape[0] for entry in output[TOKENS])


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_frames_that_are_not_new_are_not_encoded_and_their_budget_goes_to_the_others(kits, name: str, per_frame: bool):
    """The same tokens stay as of a video of the new frames alone, and as many as of all frames."""
    kit = kits(name)
    settings, prompt = rule(per_frame=per_frame), film(kit)
    headless, arguments, answers = kit.model.base_model, visual(kit, prompt), []
    run = encoded(kit, lambda: answers.append(headless.get_video_features(**arguments, pruning=settings)))
    every = PruningConfig(keep_ratio=0.3, per_frame=per_frame)
    whole = encoded(kit, lambda: headless.get_video_features(**arguments, pruning=every))
    assert run * len(SHOWN) == whole * len(NEW)
    [layout] = headless.layouts("video", **arguments)
    frame, parts = layout.numbers_scored // len(SHOWN), len(SHOWN) if per_frame else 1
    budget = parts * round(0.3 * frame * len(SHOWN) / parts)
    own = round(budget / len(NEW)) * len(NEW) if per_frame else budget
    [tokens], [mask] = answers[0][TOKENS], answers[0][MASKS["video"]]
    assert len(mask) == len(layout) and int(mask.sum()) == len(tokens) == own + layout.numbers[2]
    by_frame = mask[: frame * len(SHOWN)].view(len(SHOWN), frame).sum(1)
    assert not by_frame[[1, 3, 4]].any()
    assert not per_frame or by_frame[NEW].tolist() == [own // len(NEW)] * len(NEW)

    alone = headless.family.select_frames(headless, arguments, [NEW])
    if isinstance(alone[PIXELS["video"]], list):
        alone[PIXELS["video"]] = torch.stack(alone[PIXELS["video"]])
    ratio = budget / (frame * len(NEW))
    expected = headless.get_video_features(**alone, pruning=PruningConfig(keep_ratio=ratio, per_frame=per_frame))
    torch.testing.assert_close(tokens, expected[TOKENS][0], atol=1e-5, rtol=0)
    assert torch.equal(mask[layout.of_frames([n in NEW for n in range(len(SHOWN))])], expected[MASKS["video"]][0])


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_what_stays_is_what_the_whole_video_would_have_had_there(kits, name: str):
    """The stock tower's own tokens, all frames encoded, at the same places of the prompt: nothing looks across frames,
    and times are kept."""
    kit, prompt = kits(name), film(kits(name))
    inputs = kit.inputs(prompt)
    output = kit.model(**inputs, pruning=rule())
    features = kit.model.base_model.get_video_features(**visual(kit, prompt), pruning=OFF, return_dict=True)
    if isinstance(features[TOKENS], torch.Tensor):
        features[TOKENS] = list(features[TOKENS])
    [mask] = output[MASKS["video"]]
    given = {TOKENS: [features[TOKENS][0].reshape(-1, features[TOKENS][0].shape[-1])[mask]], MASKS["video"]: [mask]}
    for view in VIEWS:
        if features.get(view) is not None:
            given[view] = [[layer[0][mask]] for layer in features[view]]
    text = {key: value for key, value in inputs.items() if key != PIXELS["video"]}
    other = kit.model(**text, mm_encoder_outputs={"video": replaced(features, **given)})
    torch.testing.assert_close(output.logits, other.logits, atol=2e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_keeping_all_is_stock_and_a_video_without_stretches_is_as_ever(kits, name: str):
    kit = kits(name)
    prompts = [film(kit)]
    assert same(kit.answers(kit.model, *prompts, pruning=rule(keep_ratio=1.0)), kit.answers(kit.stock, *prompts))
    moving = kit.inputs(film(kit, shown=list(range(4))))
    needed, every = kit.model(**moving, pruning=rule()), kit.model(**moving, pruning=PruningConfig(keep_ratio=0.3))
    assert torch.equal(needed[MASKS["video"]][0], every[MASKS["video"]][0])
    torch.testing.assert_close(needed.logits, every.logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_equals_single(kits, name: str):
    """Videos with more and fewer stretches, beside text."""
    kit = kits(name)
    prompts = [film(kit), film(kit, 1, [0, 1, 2, 3, 3, 3]), kit.text]
    together = kit.answers(kit.model, *prompts, pruning=rule())
    assert same(together, [a for prompt in prompts for a in kit.answers(kit.model, prompt, pruning=rule())])


@torch.no_grad()
def test_a_rule_that_reads_the_question_finds_it(kits):
    kit = kits("llava_onevision")
    prompts = [film(kit), [words(9, 7), movie(kit, 1, [0, 0, 0, 0, 0, 1]), words(3, 8)]]
    settings = rule(score="cdpruner")
    together = kit.model(**kit.inputs(*prompts), pruning=settings)[MASKS["video"]]
    apart = [kit.model(**kit.inputs(prompt), pruning=settings)[MASKS["video"]][0] for prompt in prompts]
    assert all(torch.equal(a, b) for a, b in zip(together, apart))


@torch.no_grad()
@pytest.mark.parametrize("name, score", [("llava_next_video", "cls_similarity_high"), ("llava_onevision", "vispruner")])
def test_rules_that_read_the_tower_read_the_new_frames(kits, name: str, score: str):
    kit = kits(name)
    prompts = [film(kit), film(kit, 1, [0, 1, 2, 3, 3, 3])]
    arguments = [visual(kit, *prompts), *(visual(kit, prompt) for prompt in prompts)]
    both, *apart = [kit.model.base_model.get_video_features(**own, pruning=rule(score=score)) for own in arguments]
    for number, one in enumerate(apart):
        assert torch.equal(both[MASKS["video"]][number], one[MASKS["video"]][0])
        torch.testing.assert_close(both[TOKENS][number], one[TOKENS][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video", "qwen2_5_vl"])
def test_counts_are_known_before_the_tower_runs(kits, name: str):
    """Between projector and language model nothing is asked of the device."""
    kit = kits(name)
    waits = called(kit.model, "forward", **kit.inputs(film(kit)), pruning=rule())
    assert [wait for wait in waits if wait.is_ours] == []


def test_images_beside_it_are_as_ever(kits):
    kit = kits("qwen2_5_vl")
    assert same(
        kit.answers(kit.model, kit.two, pruning=rule()), kit.answers(kit.model, kit.two, pruning=rule(frames="all"))
    )


def test_the_setting_is_saved(kits, tmp_path):
    kit = kits("llava_onevision")
    kit.load(pruning=rule(), keep_ratio=None).save_pretrained(tmp_path)
    assert kit.load_from(tmp_path, codebook=None, keep_ratio=None).pruning == rule()


@pytest.mark.parametrize("name", ["llava", "kimi_k25", "internvl", "molmo2", "gemma4", "paddleocr_vl"])
def test_other_families_refuse(kits, name: str):
    with pytest.raises(ValueError, match=f"frames='where_needed' is not to be had with {name} models"):
        kits(name).model.check_pruning(rule())
