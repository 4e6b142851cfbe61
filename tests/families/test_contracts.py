"""The contracts of the README's "what is promised" over every family, against stock and against the oracle."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from transformers_rbl import PruningConfig
from transformers_rbl.models.family import COPIES
from transformers_rbl.models.memory import Past
from transformers_rbl.models.seam import CACHE, CACHE_NAMES, Call, can_chunk_images

from .conftest import ALL, GREEDY, OFF, RATIO, Answer, Kit, generated, same, until_end
from .tiny import EOS, IMAGE, SPECIAL, Picture, Prompt, words


FOUR = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [*SPECIAL, EOS]}


@pytest.fixture(autouse=True)
def without_gradients(request: pytest.FixtureRequest):
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


def test_off_is_stock_bit_for_bit_with_gradients(kit: Kit):
    """Contract 1: logits, loss, gradients, ids."""
    inputs = kit.inputs(kit.one, kit.two)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 16, -100)
    gradients = []
    for model, settings in ((kit.stock, {}), (kit.model, {"pruning": OFF})):
        output = model(**inputs, labels=labels, **settings)
        output.loss.backward()
        own = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        gradients.append((output.logits, output.loss, own))
        model.zero_grad()
    (logits, loss, expected), (our_logits, our_loss, ours) = gradients
    assert torch.equal(logits, our_logits) and torch.equal(loss, our_loss)
    assert expected and expected.keys() == ours.keys()
    assert all(torch.equal(expected[name], ours[name]) for name in expected)
    assert torch.equal(kit.stock.generate(**inputs, **GREEDY), kit.model.generate(**inputs, **GREEDY, pruning=OFF))


def test_keep_all_is_stock(kit: Kit):
    """Contract 2."""
    inputs = kit.inputs(kit.one, kit.two)
    assert torch.equal(kit.stock(**inputs).logits, kit.model(**inputs, pruning=ALL).logits)
    assert torch.equal(kit.stock.generate(**inputs, **GREEDY), kit.model.generate(**inputs, **GREEDY, pruning=ALL))


def test_forward_equals_the_oracle(kit: Kit):
    for prompt in (kit.one, kit.two):
        state = kit.oracle.prepare(prompt, RATIO)
        output = kit.model(**kit.inputs(prompt))
        assert output.prompt_mask[0].nonzero()[:, 0].tolist() == state.places
        assert len(state.places) < output.prompt_mask.shape[1]
        torch.testing.assert_close(output.logits[0], kit.oracle.logits(state), atol=2e-4, rtol=0)


def expected_of(kit: Kit, prompt: Prompt, first_turn: int | None = None) -> Answer:
    """The oracle's answer."""
    return Answer(*kit.oracle.greedy(kit.oracle.prepare(prompt, RATIO, first_turn)))


def test_generate_equals_the_oracle(kit: Kit):
    """Contract 4 besides: sequences begin with the original ids."""
    for prompt in (kit.one, kit.two):
        inputs = kit.inputs(prompt)
        assert same(generated(kit.model, inputs), [expected_of(kit, prompt)])
        sequences = kit.model.generate(**inputs, **GREEDY)
        assert torch.equal(sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_a_batch_of_different_sizes_equals_single(kit: Kit):
    """Contracts 3 and 5: left padded, several images, a row of text; the cache is as long as the longest row."""
    prompts = [kit.one, kit.two, kit.text]
    inputs = kit.inputs(*prompts)
    output = kit.model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    longest = int(output.prompt_mask.sum(-1).max())
    assert longest < inputs["input_ids"].shape[1]
    assert int(output[CACHE].get_seq_length()) == longest + len(output.logits) - 1
    assert same(kit.answers(kit.model, *prompts), [a for prompt in prompts for a in kit.answers(kit.model, prompt)])


def test_beams_with_several_sequences_equal_single(kit: Kit):
    prompts = [kit.one, [words(7, 8), kit.pictures[2], words(3, 9)]]
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    together = kit.answers(kit.model, *prompts, **beams)
    assert same(together, [answer for prompt in prompts for answer in kit.answers(kit.model, prompt, **beams)])


@pytest.mark.parametrize("prompt", ["one", "two"])
def test_beams_equal_stock_on_compact_embeddings(kit: Kit, prompt: str):
    """Where they take no embeddings (deepstack, masks of images), on compact ids beside the visual tokens that stay.
    Two images of one prompt are refused where stock mixes them."""
    state = kit.oracle.prepare(getattr(kit, prompt), RATIO)
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    if COPIES in kit.model.family.refuses and prompt == "two":
        for copies in (beams, {"do_sample": True, "num_return_sequences": 2}):
            with pytest.raises(ValueError, match="prompts of one image"):
                kit.answers(kit.model, kit.two, **copies)
        return
    along: dict[str, Any] = {kit.case.types: state.told} if kit.case.types else {}
    if state.positions is not None:
        along["position_ids"] = torch.cat([torch.arange(len(state.places))[None, None], state.positions])
    mask = torch.ones_like(state.ids)
    compact: dict[str, Any] = {"inputs_embeds": state.embeds}
    if state.deepstack or kit.name in ("gemma3", "gemma4", "paligemma"):
        tokens = state.embeds[0, state.types[0] > 0]
        parts: dict[str, Any] = {"pooler_output": tokens[None] if kit.model.family.stacked else [tokens]}
        parts |= {"deepstack_features": [[layer] for layer in state.deepstack]} if state.deepstack else {}
        made = type(kit.oracle.features(getattr(kit, prompt))["image"]["output"])
        compact = {"input_ids": state.ids, "mm_encoder_outputs": {"image": made(**parts)}}
    expected = kit.stock.generate(**compact, attention_mask=mask, **along, **GREEDY | beams)
    start = len(state.places) if "input_ids" in compact else 0
    answers = kit.answers(kit.model, getattr(kit, prompt), **beams)
    assert [answer.tokens for answer in answers] == [until_end(row) for row in expected[:, start:].tolist()]


def test_two_images_of_one_prompt_are_refused_only_where_stock_mixes_them(kit: Kit):
    """Nearly greedy samples of two images are the greedy answer; where ours refuses them, stock's are not."""
    copies = {"do_sample": True, "temperature": 1e-4, "num_return_sequences": 2}
    model = kit.stock if COPIES in kit.model.family.refuses else kit.model
    greedy, sampled = (kit.answers(model, kit.two, **more) for more in ({}, copies))
    mixed = any(sample.tokens != greedy[0].tokens for sample in sampled)
    assert mixed == (model is kit.stock)


def turn(kit: Kit, *prompts: Prompt) -> Any:
    """A first turn of four tokens."""
    return kit.model.generate(**kit.inputs(*prompts), **FOUR, return_dict_in_generate=True)


def continued(kit: Kit, sequences: torch.Tensor, first: dict[str, torch.Tensor], more: list[Prompt],
              pixels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # fmt: skip
    """Inputs of a second turn: the sequences of the first, then `more` of one length, with these pixels."""
    new = kit.inputs(*more)
    said = sequences.shape[1] - first["input_ids"].shape[1]
    zeros = torch.zeros(len(sequences), said, dtype=torch.long)
    inputs = {
        "input_ids": torch.cat([sequences, new["input_ids"]], 1),
        "attention_mask": torch.cat([first["attention_mask"], zeros + 1, new["attention_mask"]], 1),
        **pixels,
    }
    if kit.case.types:
        later = [torch.ones_like(part) if kit.case.prefix else part for part in (zeros, new[kit.case.types])]
        inputs[kit.case.types] = torch.cat([first[kit.case.types], *later], 1)
    return inputs


@pytest.mark.parametrize("pixels", ["no pixels", "all pixels"])
def test_a_second_turn_equals_the_oracle_under_every_name_of_the_cache(kit: Kit, pixels: str):
    """Contract 6."""
    prompts, question = [kit.one, kit.two], words(4, 6)
    first, begun = kit.inputs(*prompts), turn(kit, *prompts)
    expected = []
    for row, prompt in enumerate(prompts):
        said = begun.sequences[row, first["input_ids"].shape[1] :].tolist()
        state = kit.oracle.add(kit.oracle.prepare(prompt, RATIO), [*said, *question])
        expected.append(Answer(*kit.oracle.greedy(state)))
    visual = kit.case.visual(prompts) if pixels == "all pixels" else {}
    inputs = continued(kit, begun.sequences, first, [[question]] * 2, visual)
    for name in CACHE_NAMES[:2]:
        assert same(generated(kit.model, inputs, **{name: turn(kit, *prompts)[CACHE]}), expected)


@pytest.mark.parametrize("settings", [OFF, ALL], ids=["off", "keep all"])
def test_a_turn_from_which_nothing_leaves_goes_on_as_stock(kit: Kit, settings: PruningConfig):
    """Contracts 1 and 2 behind a cache: an image, then text, then another image kept whole and text again, against one
    pass of the stock model over everything."""
    skip_where_stock_sees_one_way(kit)
    model, question = kit.load(), words(4, 6)
    inputs, prompt = kit.inputs(kit.one), [*kit.one]
    begun = model.generate(**inputs, **FOUR, return_dict_in_generate=True, pruning=settings)
    turns = [[question], [words(2, 6), kit.pictures[1], words(3, 7)], [question]]
    for more in turns[:1] if settings is OFF else turns:
        prompt += [begun.sequences[0, inputs["input_ids"].shape[1] :].tolist(), *more]
        inputs = continued(kit, begun.sequences, inputs, [more], kit.case.visual([more]) if len(more) > 1 else {})
        over = {**inputs, **kit.case.visual([prompt])}
        cache = {CACHE: copy.deepcopy(begun[CACHE])}
        assert same(generated(model, inputs, **cache, pruning=settings), generated(kit.stock, over))
        begun = model.generate(
            **inputs, **{CACHE: begun[CACHE]}, **FOUR, return_dict_in_generate=True, pruning=settings
        )


def skip_where_stock_sees_one_way(kit: Kit) -> None:
    """Gemma 3 of 5.19 lets a new image behind a cache see forwards alone, in the stock class as in ours."""
    if kit.name == "gemma3" and not can_chunk_images():
        pytest.skip("Stock's own: on this version a new image behind a cache sees forwards alone.")
    if kit.name == "molmo2":
        pytest.skip(
            "Stock's own: images of one pass see each other, and one in a cache no later one. See the next test."
        )


def test_a_new_image_behind_a_cache_is_seen_as_stock_sees_it(kit: Kit):
    """Kept whole: turn by turn as the stock class answers on its own cache, where an answer depends on the turns."""
    if kit.name != "molmo2":
        pytest.skip("One pass of the stock model over everything is the stricter test.")
    answers = []
    for model, settings in ((kit.stock, {}), (kit.load(), {"pruning": ALL})):
        inputs = kit.inputs(kit.one)
        begun = model.generate(**inputs, **FOUR, return_dict_in_generate=True, **settings)
        more = [words(2, 6), kit.pictures[1], words(3, 7)]
        inputs = continued(kit, begun.sequences, inputs, [more], kit.case.visual([more]))
        answers.append(generated(model, inputs, **{CACHE: begun[CACHE]}, **settings))
    assert same(*answers)


@pytest.mark.parametrize("pixels", ["new pixels alone", "all pixels"])
def test_a_new_image_in_the_second_turn_equals_the_oracle(kit: Kit, pixels: str):
    """The prompt given whole, with the new image's pixels or with those of both."""
    skip_where_stock_sees_one_way(kit)
    more = [[words(2, 6), kit.pictures[1], words(3, 7)]]
    first = kit.inputs(kit.one)
    begun = turn(kit, kit.one)
    said = begun.sequences[0, first["input_ids"].shape[1] :].tolist()
    prompt = [*kit.one, said, *more[0]]
    visual = kit.case.visual([prompt] if pixels == "all pixels" else more)
    inputs = continued(kit, begun.sequences, first, more, visual)
    assert same(
        generated(kit.model, inputs, **{CACHE: begun[CACHE]}), [expected_of(kit, prompt, first["input_ids"].shape[1])]
    )


def test_a_new_image_in_the_second_turn_of_a_batch(kit: Kit):
    """New pixels alone, two rows: each image goes to its own prompt."""
    skip_where_stock_sees_one_way(kit)
    prompts = [kit.one, [words(7, 8), kit.pictures[2], words(3, 9)]]
    more = [[words(2, 6), picture, words(3, 7)] for picture in (kit.pictures[1], kit.pictures[1])]
    first, begun = kit.inputs(*prompts), turn(kit, *prompts)
    inputs = continued(kit, begun.sequences, first, more, kit.case.visual(more))
    answers = generated(kit.model, inputs, **{CACHE: begun[CACHE]})
    said = begun.sequences[:, first["input_ids"].shape[1] :].tolist()
    for row, prompt in enumerate(prompts):
        length = kit.inputs(prompt)["input_ids"].shape[1]
        assert same([answers[row]], [expected_of(kit, [*prompt, said[row], *more[row]], length)])


@pytest.mark.parametrize("mode", ["chunked", "static", "lookup"])
def test_what_stock_answers_as_it_answers_greedily_ours_does_and_the_rest_raises(kit: Kit, mode: str):
    """Contract 6: chunked prefill, a static cache, prompt lookup. Never silently worse than stock."""
    settings: dict[str, Any] = {
        "chunked": {"prefill_chunk_size": 7},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[mode]
    prompts = [kit.one] if mode == "lookup" else [kit.one, kit.two]
    if mode == "static" and kit.name == "gemma4" and not can_chunk_images():
        pytest.skip("Stock's own: on this version a static cache of Gemma 4 answers otherwise than a dynamic one.")

    def holds(model: Any) -> bool:
        return same(kit.answers(model, *prompts, **settings), kit.answers(model, *prompts))

    if outcome(lambda: holds(kit.stock)) is True:
        assert holds(kit.model)
    else:
        ours = outcome(lambda: holds(kit.model))
        assert ours is True or isinstance(ours, ValueError), ours


def test_embeddings_in_place_of_ids(kit: Kit):
    """Where the stock class answers from `inputs_embeds` beside pixels as it does from ids, so does ours."""
    inputs = kit.inputs(kit.one)
    embeds = {**inputs, "inputs_embeds": kit.stock.get_input_embeddings()(inputs["input_ids"])}
    del embeds["input_ids"]
    stock = outcome(lambda: kit.stock(**embeds).logits)
    ours = outcome(lambda: kit.model(**embeds).logits)
    if isinstance(stock, Exception) or not torch.allclose(stock, kit.stock(**inputs).logits, atol=2e-4):
        assert isinstance(ours, ValueError) or type(ours) is type(stock), f"stock: {stock!r}"
    else:
        torch.testing.assert_close(ours, kit.model(**inputs).logits, atol=2e-4, rtol=0)


def outcome(call: Any) -> Any:
    """What a call returns, or the exception that it raises."""
    try:
        return call()
    except (AssertionError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        return error


def test_loss_and_gradients_equal_those_of_the_oracle(kit: Kit):
    state = kit.oracle.prepare(kit.two, RATIO)
    inputs = kit.inputs(kit.two)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 16, -100)
    kit.model.zero_grad()
    loss = kit.model(**inputs, labels=labels).loss
    loss.backward()
    target = labels[0, state.places][1:]
    scores = kit.oracle.logits(state)[:-1]
    expected = torch.nn.functional.cross_entropy(scores, target, ignore_index=-100)
    torch.testing.assert_close(loss, expected, atol=2e-4, rtol=1e-4)
    head = kit.stock.get_output_embeddings().weight
    (gradient,) = torch.autograd.grad(expected, [head])
    ours = kit.model.get_output_embeddings().weight.grad
    if not kit.stock.config.tie_word_embeddings and head is not kit.stock.get_input_embeddings().weight:
        torch.testing.assert_close(ours, gradient, atol=2e-4, rtol=1e-3)
    kit.model.zero_grad()
    kit.stock.zero_grad()


def test_two_threads_on_one_model(kit: Kit):
    """Contract 7: nothing is shared between calls."""
    prompts = [[kit.one], [kit.two], [kit.one, kit.two], [kit.two]]
    expected = [kit.answers(kit.model, *batch) for batch in prompts]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda batch: kit.answers(kit.model, *batch), prompts))
    assert all(same(ours, alone) for ours, alone in zip(together, expected))


def test_a_call_leaves_nothing_on_the_module(kit: Kit):
    """Contract 7: `rope_deltas` of m-RoPE models stays None."""
    model = kit.load()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    inputs = kit.inputs(kit.one, kit.two)
    model(**inputs)
    model.generate(**inputs, **GREEDY)
    for name, module in model.named_modules():
        after = {key: value for key, value in vars(module).items() if key != "_output_capturing_hooks_installed"}
        assert set(after) <= set(before[name])
        changed = [key for key, value in after.items() if value is not before[name][key] and value != before[name][key]]
        assert not changed, (name, changed)


def test_a_hidden_part_of_an_image_leaves_with_its_tokens(kit: Kit):
    """Placeholders that the mask hides take their visual tokens out, as the stock model answers on what is left."""
    inputs = kit.inputs(kit.two)
    hidden = (inputs["input_ids"][0] == IMAGE).nonzero()[::3, 0]
    mask = inputs["attention_mask"].clone()
    mask[0, hidden] = 0
    inputs["attention_mask"] = mask
    state = kit.oracle.prepare(kit.two, RATIO)
    if state.positions is not None:  # stock's get_rope_index reads whole images
        stock, ours = (outcome(lambda model=model: model(**inputs).logits) for model in (kit.stock, kit.model))
        assert isinstance(stock, Exception) and isinstance(ours, Exception)
        return
    stay = [i for i, place in enumerate(state.places) if place not in hidden.tolist()]
    rest = replace(
        state, embeds=state.embeds[:, stay], ids=state.ids[:, stay], types=state.types[:, stay],
        told=state.told[:, stay], places=[state.places[i] for i in stay],
    )  # fmt: skip
    assert same(generated(kit.model, inputs), [Answer(*kit.oracle.greedy(rest))])
    assert kit.model(**inputs).prompt_mask[0].nonzero()[:, 0].tolist() == rest.places
    beams = kit.model.generate(**inputs, **GREEDY | {"num_beams": 2, "max_new_tokens": 4})
    assert torch.equal(beams[:, : mask.shape[1]], inputs["input_ids"])


@pytest.mark.parametrize("newlines", ["row", "last"])
def test_row_ends_in_text_follow_newlines(kit: Kit, newlines: str):
    """`"row"` drops those of rows from which nothing stays, `"last"` all between an image's rows; also behind a cache,
    in batches, and where an image's end mark stands alone between two images."""
    if not kit.model.family.row_marks:
        pytest.skip("Rows of its images do not end with marks in text.")
    settings = PruningConfig(keep_ratio=0.1, newlines=newlines)
    neighbours = [words(3), *kit.pictures, words(4)]
    for prompt in (kit.one, neighbours):
        state = kit.oracle.prepare(prompt, 0.1, newlines=newlines)
        output = kit.model(**kit.inputs(prompt), pruning=settings)
        assert output.prompt_mask[0].nonzero()[:, 0].tolist() == state.places
        assert len(state.places) < len(kit.oracle.prepare(prompt, 0.1).places)
        expected = Answer(*kit.oracle.greedy(state))
        assert same(kit.answers(kit.model, prompt, pruning=settings), [expected])
    batch = [kit.one, neighbours, kit.text]
    alone = [answer for prompt in batch for answer in kit.answers(kit.model, prompt, pruning=settings)]
    assert same(kit.answers(kit.model, *batch, pruning=settings), alone)
    inputs, model = kit.inputs(kit.one), kit.load(pruning=settings, keep_ratio=None)
    begun = model.generate(**inputs, **FOUR, return_dict_in_generate=True)
    said = begun.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    more = continued(kit, begun.sequences, inputs, [[words(4, 6)]], {})
    state = kit.oracle.add(kit.oracle.prepare(kit.one, 0.1, newlines=newlines), [*said, *words(4, 6)])
    assert same(generated(model, more, **{CACHE: begun[CACHE]}), [Answer(*kit.oracle.greedy(state))])


def thumbnails(kit: Kit, prompt: Prompt) -> tuple[Prompt, dict[str, torch.Tensor]]:
    """A prompt's images cut down to their thumbnails by hand: what their tensors and marks are without tiles."""
    tensors, pictures = [], []
    for picture in (item for item in prompt if isinstance(item, Picture)):
        one = dict(picture.tensors)
        if kit.name == "molmo2":
            one["pixel_values"], one["image_token_pooling"] = one["pixel_values"][:1], one["image_token_pooling"][:4]
            one["image_grids"] = torch.tensor([[2, 2, 0, 0]])
        elif kit.name == "perception_lm":
            one["pixel_values"] = one["pixel_values"][:, :1]
        else:
            place = 0 if kit.name == "ovis2" else len(one["pixel_values"]) - 1
            one["pixel_values"] = one["pixel_values"][place : place + 1]
        tensors.append(one)
        pictures.append(replace(picture, tensors=one))
    return pictures, kit.case.visual([pictures])


WITH_THUMBNAILS = {"internvl": 16, "cohere2_vision": 16, "ovis2": 16, "molmo2": 4, "perception_lm": 4}


def test_base_images_are_the_thumbnails_where_there_are_any(kit: Kit):
    """`tiles="base"`: the tower sees thumbnails alone, they are scored and counted alone, and no token of a tile stays.
    LLaVA's are in files of their own; elsewhere it is refused, where nothing tells which tile is the thumbnail."""
    settings = PruningConfig(keep_ratio=RATIO, tiles="base")
    inputs = kit.inputs(kit.one, kit.two)
    if kit.model.family.tiled:
        with pytest.raises(ValueError, match=f"tiles='base' is not to be had with {kit.name}"):
            kit.model(**inputs, pruning=settings)
        return
    output = kit.model(**inputs, pruning=settings)
    if kit.name not in WITH_THUMBNAILS:
        assert output.keep_masks
        return
    length = WITH_THUMBNAILS[kit.name]
    pictures, alone = thumbnails(kit, [*kit.one, *kit.two])
    expected = kit.stock.model.get_image_features(**alone, return_dict=True).pooler_output
    encoded = kit.model.prepare(Call.read(inputs), Past.of(None), settings).call.features["image"].pooler_output
    for picture, mask, tokens, thumbnail in zip(pictures, output.keep_masks, encoded, expected, strict=True):
        first = 0 if kit.name in ("ovis2", "molmo2", "perception_lm") else len(picture) - length
        kept = kit.oracle.keep(replace(picture, parts=[length]), thumbnail, RATIO)
        assert mask.nonzero()[:, 0].tolist() == [first + i for i, stays in enumerate(kept) if stays]
        torch.testing.assert_close(tokens, thumbnail[torch.tensor(kept)], atol=1e-5, rtol=0)
    pixels = []
    hook = kit.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, named: pixels.append(args[0] if args else named["pixel_values"]), with_kwargs=True
    )
    kit.model(**inputs, pruning=settings)
    hook.remove()
    assert [len(part) for part in pixels] == [len(pictures)]
    single = [answer for prompt in (kit.one, kit.two) for answer in kit.answers(kit.model, prompt, pruning=settings)]
    assert same(kit.answers(kit.model, kit.one, kit.two, pruning=settings), single)


def test_base_images_need_the_prompt_where_it_alone_tells_which_they_are(kit: Kit):
    if kit.name not in ("internvl", "cohere2_vision", "ovis2"):
        pytest.skip("Its tensors tell, or nothing does.")
    with pytest.raises(ValueError, match="Only the prompt tells which tile"):
        kit.model.get_image_features(
            **kit.case.visual([kit.one]), pruning=PruningConfig(keep_ratio=RATIO, tiles="base")
        )
