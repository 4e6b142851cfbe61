"""Videos: budgets of a video or of each frame, placeholders in one run or in several, images beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from transformers_rbl import PruningConfig
from transformers_rbl.models.family import COPIES
from transformers_rbl.models.seam import CACHE, can_chunk_images

from .conftest import ALL, GREEDY, RATIO, Answer, Kit, generated, same
from .test_contracts import FOUR, continued, outcome, skip_where_stock_sees_one_way
from .tiny import CASES, Picture, Prompt, drawing, words


WITH_VIDEO = [
    pytest.param(name, marks=() if case.core else pytest.mark.slow) for name, case in CASES.items() if case.video
]


@pytest.fixture(params=WITH_VIDEO)
def kit(request: pytest.FixtureRequest, kits: Callable[[str], Kit]) -> Kit:
    if request.param == "kimi_k25" and not can_chunk_images():
        pytest.skip("Stock's own: on this version chunks of different lengths cannot be encoded.")
    return kits(request.param)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def film(kit: Kit, number: int = 0) -> Prompt:
    """A prompt with one video."""
    return [words(4, number), kit.case.movies()[number], words(5, 1)]


def by_frame(prompt: Prompt, kit: Kit) -> Prompt:
    """The same prompt for the oracle, each frame of its videos with a budget of its own."""
    tokens = 4 if kit.name in ("llava_next_video", "molmo2") else 6
    return [
        replace(item, parts=[tokens] * (len(item) // tokens))
        if isinstance(item, Picture) and item.modality == "video" else item
        for item in prompt
    ]  # fmt: skip


def expected_of(kit: Kit, prompt: Prompt, per_frame: bool = True) -> Answer:
    """The oracle's answer; frames have budgets of their own by default."""
    return Answer(*kit.oracle.greedy(kit.oracle.prepare(by_frame(prompt, kit) if per_frame else prompt, RATIO)))


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_frames_that_come_as_images_have_an_images_budget_each(name: str, kits: Callable[[str], Kit]):
    """Behind a timestamp each, in a prompt with an image in tiles; in a batch, and behind a cache."""
    kit = kits(name)
    frames = [kit.case.image((1, 1), drawing(torch.Generator().manual_seed(seed))) for seed in range(3)]
    film = [item for number, frame in enumerate(frames) for item in (words(2, number), frame)]
    prompt, other = [*film, kit.pictures[0], words(3, 5)], [words(3), *film, words(4, 6)]
    output = kit.model(**kit.inputs(prompt))
    tiles = len(kit.pictures[0].parts)
    assert [len(mask) for mask in output.keep_masks] == [16] * 3 + [len(kit.pictures[0]) // tiles] * tiles
    assert same(kit.answers(kit.model, prompt), [expected_of(kit, prompt)])
    single = [answer for one in (prompt, other) for answer in kit.answers(kit.model, one)]
    assert same(kit.answers(kit.model, prompt, other), single)
    first, more = kit.inputs(prompt), [[words(2, 6), frames[0], words(3, 7)]]
    begun = kit.model.generate(**first, **FOUR, return_dict_in_generate=True)
    said = begun.sequences[0, first["input_ids"].shape[1] :].tolist()
    inputs = continued(kit, begun.sequences, first, more, kit.case.visual(more))
    expected = expected_of(kit, [*prompt, said, *more[0]])
    assert same(generated(kit.model, inputs, **{CACHE: begun[CACHE]}), [expected])


def test_layouts_are_those_of_stock_features(kit: Kit):
    """One layout a video, known before it is encoded: frames, grid, and as many tokens as stock returns."""
    for movie, frames in zip(kit.case.movies(), (3, 2)):
        stock = kit.stock.model.get_video_features(**movie.tensors, return_dict=True).pooler_output
        layouts = kit.model.model.layouts("video", **movie.tensors)
        lengths = [len(layout) for layout in layouts]
        assert sum(lengths) == sum(entry.reshape(-1, entry.shape[-1]).shape[0] for entry in stock) == len(movie)
        assert lengths == [layout.frames * layout.grid[0] * layout.grid[1] for layout in layouts] == movie.parts
        assert [layout.frames for layout in layouts] == ([1] * len(layouts) if kit.name == "kimi_k25" else [frames])


def test_keep_all_is_stock(kit: Kit):
    prompts = [film(kit), film(kit, 1)]
    if kit.name == "llava_next_video":
        prompts = [film(kit), [words(2), *film(kit)]]  # stock takes videos of one length
    assert same(kit.answers(kit.model, *prompts, pruning=ALL), kit.answers(kit.stock, *prompts))


@pytest.mark.parametrize("per_frame", [False, True])
def test_generate_and_forward_equal_the_oracle(kit: Kit, per_frame: bool):
    settings = PruningConfig(keep_ratio=RATIO, per_frame=per_frame)
    for prompt in (film(kit), film(kit, 1)):
        state = kit.oracle.prepare(by_frame(prompt, kit) if per_frame else prompt, RATIO)
        output = kit.model(**kit.inputs(prompt), pruning=settings)
        assert output.prompt_mask[0].nonzero()[:, 0].tolist() == state.places
        assert len(output.video_keep_masks) == len(prompt[1].parts)
        torch.testing.assert_close(output.logits[0], kit.oracle.logits(state), atol=2e-4, rtol=0)
        assert same(kit.answers(kit.model, prompt, pruning=settings), [expected_of(kit, prompt, per_frame)])


def test_an_image_and_a_video_in_one_prompt(kit: Kit):
    """In either order, also where stock's own check cannot tell their placeholders apart (GLM-4V: token types do)."""
    movie = kit.case.movies()[1]
    for prompt in ([*kit.one, movie, words(3, 7)], [words(2), movie, *kit.one]):
        if isinstance(outcome(lambda prompt=prompt: kit.answers(kit.stock, prompt)), Exception):
            if not kit.model.family.video_as_image:
                with pytest.raises(ValueError):
                    kit.answers(kit.model, prompt)
                continue
        assert same(kit.answers(kit.model, prompt), [expected_of(kit, prompt)])


def test_a_batch_of_an_image_a_video_and_text_equals_single(kit: Kit):
    prompts = [kit.one, film(kit), kit.text]
    refused = isinstance(outcome(lambda: kit.answers(kit.stock, *prompts)), Exception)
    if refused and not kit.model.family.video_as_image:
        with pytest.raises(ValueError):
            kit.answers(kit.model, *prompts)
        prompts = [film(kit), kit.text]
    assert same(kit.answers(kit.model, *prompts), [a for prompt in prompts for a in kit.answers(kit.model, prompt)])


def test_beams_over_videos_equal_single(kit: Kit):
    prompts = [film(kit, 1), [words(2, 9), *film(kit, 1)]]
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    if COPIES in kit.model.family.refuses:
        assert isinstance(outcome(lambda: kit.answers(kit.stock, *prompts, **beams)), Exception)
        with pytest.raises(ValueError, match="prompts of one image"):
            kit.answers(kit.model, *prompts, **beams)
        return
    together = kit.answers(kit.model, *prompts, **beams)
    assert same(together, [answer for prompt in prompts for answer in kit.answers(kit.model, prompt, **beams)])


@pytest.mark.parametrize("pixels", ["none", "all", "new video", "new image"])
def test_a_second_turn_equals_the_oracle(kit: Kit, pixels: str):
    """Behind the cache of a video: text, with or without the video's pixels; a new video; a new image."""
    if pixels.startswith("new"):
        skip_where_stock_sees_one_way(kit)
    movie: Any = kit.case.movies()[0]
    prompt = [words(4), movie, words(5, 1)]
    new = {"new video": [movie], "new image": [kit.pictures[1]]}.get(pixels, [])
    more = [[words(2, 6), *new, words(3, 7)]]
    first = kit.inputs(prompt)
    begun = kit.model.generate(**first, **FOUR, return_dict_in_generate=True)
    said = begun.sequences[0, first["input_ids"].shape[1] :].tolist()
    visual = kit.case.visual([prompt]) if pixels == "all" else kit.case.visual(more) if new else {}
    inputs = continued(kit, begun.sequences, first, more, visual)
    expected = expected_of(kit, [*prompt, said, *more[0]])
    assert same(generated(kit.model, inputs, **{CACHE: begun[CACHE]}), [expected])


def test_a_call_with_videos_leaves_nothing_on_the_module(kit: Kit):
    model = kit.load()
    model.generate(**kit.inputs(film(kit)), **GREEDY)
    assert getattr(model.model, "rope_deltas", None) is None
