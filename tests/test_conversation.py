"""Several turns on one cache, as stock does it: the full ids, the returned cache, pixels or none."""

import copy

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging import version
from transformers import StaticCache

from conftest import GREEDY, visual
from transformers_rbl import PruningConfig
from transformers_rbl.models.seam import CACHE, CACHE_NAMES


FIRST = "<s>USER: <image>\nWhat is it? ASSISTANT:"
MORE = " USER: and why? ASSISTANT:"


def append(family, sequences, text):
    ids = family.processor.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return torch.cat([sequences, ids.expand(len(sequences), -1)], dim=1)


def turn(model, inputs, **kwargs):
    return model.generate(**inputs, **GREEDY, eos_token_id=None, return_dict_in_generate=True, **kwargs)


def test_a_text_turn_equals_starting_over(family, pruned):
    inputs = family.inputs([FIRST])
    first = turn(pruned, inputs)
    ids = append(family, first.sequences, MORE)
    over = pruned.generate(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, **GREEDY)
    second = pruned.generate(input_ids=ids, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, over)
    assert first.past_key_values.get_seq_length() < ids.shape[1]


def test_processors_remember_the_text_of_earlier_turns(family, pruned):
    inputs = family.inputs([FIRST])
    first = turn(pruned, inputs)
    ids = append(family, first.sequences, MORE)
    penalty = {**GREEDY, "repetition_penalty": 3.0}
    over = pruned.generate(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, **penalty)
    assert torch.equal(pruned.generate(input_ids=ids, past_key_values=first.past_key_values, **penalty), over)


def test_beams_about_a_second_image(family, pruned):
    """Stock wants the cache repeated for beams; placeholders of the cached image must not be counted again."""
    images = family.images(2)
    first = turn(pruned, family.inputs([FIRST], images[:1]))
    question = family.inputs(["USER: <image>\nand this? ASSISTANT:"], images[1:])
    ids = torch.cat([first.sequences, question.input_ids], dim=1)
    beams = {**GREEDY, "num_beams": 3}
    expected = pruned.generate(input_ids=ids, **family.processor.image_processor(images, return_tensors="pt"), **beams)
    cache = first.past_key_values
    cache.batch_repeat_interleave(3)
    pixels = visual(question)
    assert torch.equal(pruned.generate(input_ids=ids, past_key_values=cache, **pixels, **beams), expected)


def test_a_third_turn_and_a_second_image(family, pruned):
    images = family.images(2)
    inputs = family.inputs([FIRST], images[:1])
    first = turn(pruned, inputs)
    ids = append(family, first.sequences, MORE)
    second = turn(pruned, {"input_ids": ids}, past_key_values=first.past_key_values)
    question = family.inputs(["USER: <image>\nand this? ASSISTANT:"], images[1:])
    ids = torch.cat([second.sequences, question.input_ids], dim=1)
    both = family.processor.image_processor(images, return_tensors="pt")
    expected = pruned.generate(input_ids=ids, **both, **GREEDY)
    for pixels in (both, visual(question)):
        cache = copy.deepcopy(second.past_key_values)
        encoded = []
        hook = pruned.model.vision_tower.register_forward_pre_hook(
            lambda module, args, kwargs, log=encoded: log.append(len(args[0])), with_kwargs=True
        )
        third = pruned.generate(input_ids=ids, past_key_values=cache, **pixels, **GREEDY)
        hook.remove()
        assert torch.equal(third, expected)
        assert encoded == [pruned.model.family.tiles(pruned.model, question)[0]]  # the new image only


def test_new_ids_alone_beside_a_mask_for_all(family, pruned):
    inputs = family.inputs([FIRST])
    first = turn(pruned, inputs)
    ids = append(family, first.sequences, MORE)
    expected = pruned.generate(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, **GREEDY)
    # The cache lacks the last sampled token, so the new ids begin with it.
    new = ids[:, first.sequences.shape[1] - 1 :]
    second = pruned.generate(
        input_ids=new, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values, **GREEDY
    )
    assert torch.equal(second[:, new.shape[1] :], expected[:, ids.shape[1] :])


def test_a_batch_of_conversations(family, pruned):
    texts = [FIRST, "<s>USER: see <image> and <image>. ASSISTANT:"]
    inputs = family.inputs(texts, family.images(3))
    first = turn(pruned, inputs)
    ids = append(family, first.sequences, MORE)
    new = ids.shape[1] - inputs.input_ids.shape[1]
    mask = torch.cat([inputs.attention_mask, torch.ones(2, new, dtype=torch.long)], dim=1)
    expected = pruned.generate(**{**inputs, "input_ids": ids, "attention_mask": mask}, **GREEDY)
    second = pruned.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_padded_batch_goes_on_under_every_name_of_the_cache(family, pruned, name):
    inputs = family.inputs([FIRST, "<s>USER: see <image> and <image>. ASSISTANT:"], family.images(3))
    first = turn(pruned, inputs)
    ids = append(family, first.sequences, MORE)
    mask = torch.cat(
        [inputs.attention_mask, inputs.attention_mask.new_ones(2, ids.shape[1] - len(inputs.attention_mask[0]))], 1
    )
    over = turn(pruned, {**inputs, "input_ids": ids, "attention_mask": mask}, output_logits=True)
    whole = pruned(**{**inputs, "input_ids": ids, "attention_mask": mask})
    second = turn(pruned, {"input_ids": ids, "attention_mask": mask}, output_logits=True, **{name: first[CACHE]})
    assert torch.equal(second.sequences, over.sequences)
    torch.testing.assert_close(torch.stack(second.logits), torch.stack(over.logits), atol=2e-4, rtol=0)
    step = pruned(**{**inputs, "input_ids": ids[:, :-5], "attention_mask": mask[:, :-5]})
    last = pruned(input_ids=ids[:, -5:], attention_mask=mask, **{name: step[CACHE]})
    torch.testing.assert_close(last.logits, whole.logits[:, -5:], atol=2e-4, rtol=0)


def test_a_cache_under_two_names_is_refused(pruned, one):
    cache = pruned(**one)[CACHE]
    for run in (pruned, pruned.generate):
        with pytest.raises(ValueError, match="given twice"):
            run(input_ids=one.input_ids, cache=cache, past_key_values=cache)


def test_text_first_then_an_image(family, stock, pruned):
    opening = family.inputs(["<s>USER: hello ASSISTANT:"], [])
    first = turn(pruned, opening)
    question = family.inputs(["USER: <image>\nand this? ASSISTANT:"])
    ids = torch.cat([first.sequences, question.input_ids], dim=1)
    pixels = visual(question)
    expected = pruned.generate(input_ids=ids, **pixels, **GREEDY)
    second = pruned.generate(input_ids=ids, past_key_values=first.past_key_values, **pixels, **GREEDY)
    assert torch.equal(second, expected)


@pytest.mark.parametrize("given", [False, True], ids=["no positions", "positions"])
def test_decoding_by_hand_with_forward(family, pruned, given):
    """A loop over `forward` with full-length masks and positions, as people write it, on a ragged batch."""
    inputs = family.inputs([FIRST, "<s>USER: see <image> and <image>. ASSISTANT:"], family.images(3))
    expected = pruned.generate(**inputs, **GREEDY)[:, inputs.input_ids.shape[1] :]
    mask, tokens = inputs.attention_mask, []

    def where(new):
        return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:]} if given else {}

    output = pruned(**inputs, **where(mask.shape[1]), use_cache=True)
    for _ in range(GREEDY["max_new_tokens"]):
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        step = {"input_ids": tokens[-1], "attention_mask": mask, "past_key_values": output.past_key_values}
        output = pruned(**step, **where(1), use_cache=True)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


def test_sampled_conversations_continue_in_parallel(family, pruned):
    inputs = family.inputs([FIRST])
    torch.manual_seed(0)
    first = pruned.generate(
        **inputs,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=5,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    ids = append(family, first.sequences, MORE)
    second = pruned.generate(input_ids=ids, past_key_values=first.past_key_values, **GREEDY)
    pixels = {key: value.repeat_interleave(3, dim=0) for key, value in visual(inputs).items()}
    assert torch.equal(second, pruned.generate(input_ids=ids, **pixels, **GREEDY))


def test_pruning_switched_off_for_a_later_turn(family, pruned):
    inputs = family.inputs([FIRST])
    first = turn(pruned, inputs)
    ids = append(family, first.sequences, MORE)
    off = PruningConfig(enabled=False)
    second = pruned.generate(input_ids=ids, past_key_values=first.past_key_values, **GREEDY, pruning=off)
    over = pruned.generate(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, **GREEDY)
    assert torch.equal(second, over)


def test_bookkeeping_that_does_not_match_raises(family, pruned):
    first = turn(pruned, family.inputs([FIRST]))
    ids = append(family, first.sequences, MORE)
    other = ids.clone()
    other[0, 1] += 1
    with pytest.raises(ValueError, match="do not begin with the prompt"):
        pruned.generate(input_ids=other, past_key_values=first.past_key_values, **GREEDY)
    with pytest.raises(ValueError, match="rows"):
        pruned.generate(input_ids=ids.repeat(2, 1), past_key_values=first.past_key_values, **GREEDY)
    with pytest.raises(ValueError, match="adds none"):
        pruned.generate(input_ids=first.sequences[:, :-1], past_key_values=first.past_key_values, **GREEDY)
    cropped = first.past_key_values
    cropped.crop(3 if version.parse(transformers.__version__) < version.parse("5.20") else 3 - cropped.get_seq_length())
    with pytest.raises(ValueError, match="cropped"):
        pruned.generate(input_ids=ids, past_key_values=first.past_key_values, **GREEDY)


def test_a_static_cache_can_be_reset_and_used_again(family, pruned):
    cache = StaticCache(config=pruned.config.get_text_config(), max_cache_len=120)
    for seed in (1, 2):
        inputs = family.inputs([FIRST], family.images(2, seed)[seed - 1 : seed])
        cache.reset()
        again = pruned.generate(**inputs, **GREEDY, past_key_values=cache)
        assert torch.equal(again, pruned.generate(**inputs, **GREEDY))


def test_padded_text_turns_then_images(family, pruned):
    """Rows of different lengths: positions of the images follow each row's own text, not the padding."""
    first = turn(
        pruned, opening := family.inputs(["<s>USER: hello there, you ASSISTANT:", "<s>USER: hi ASSISTANT:"], [])
    )
    question = family.inputs(["USER: <image>\nand this? ASSISTANT:"] * 2, family.images(1) * 2)
    ids = torch.cat([first.sequences, question.input_ids], dim=1)
    new = ids.shape[1] - opening.input_ids.shape[1]
    mask = torch.cat([opening.attention_mask, torch.ones(2, new, dtype=torch.long)], dim=1)
    call = {"input_ids": ids, "attention_mask": mask, **visual(question)}
    expected = pruned.generate(**call, **GREEDY)
    own = pruned(**call).logits[:, -1]
    cached = pruned.generate(
        **call, past_key_values=first.past_key_values, **GREEDY, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(cached.sequences, expected)
    torch.testing.assert_close(cached.logits[0], own, atol=2e-4, rtol=0)


def test_a_second_turn_where_a_row_ended_early(family, pruned):
    """Padding that generation left behind is neither attended to nor counted in positions."""
    inputs = family.inputs([FIRST, FIRST], family.images(2))
    words = pruned.generate(**inputs, **GREEDY, eos_token_id=None)[:, inputs.input_ids.shape[1] :]
    early = next(
        (step, int(token))
        for step, token in enumerate(words[0, 1:5], start=1)
        if token not in words[1] and token not in words[0, :step]
    )
    eos = early[1]
    first = pruned.generate(**inputs, **GREEDY, eos_token_id=eos, return_dict_in_generate=True)
    answered = first.sequences[:, inputs.input_ids.shape[1] :]
    ended = torch.nn.functional.pad((answered == eos).cumsum(1)[:, :-1] > 0, (1, 0))
    assert ended.any() and not ended.all(0).any()
    mask = torch.cat([inputs.attention_mask, (~ended).long()], 1)
    ids = append(family, first.sequences, MORE)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    over = turn(pruned, {**inputs, "input_ids": ids, "attention_mask": mask}).sequences
    second = turn(pruned, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)
    assert torch.equal(second.sequences, over)
    ids = append(family, second.sequences, MORE)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    over = turn(pruned, {**inputs, "input_ids": ids, "attention_mask": mask}).sequences
    third = turn(pruned, {"input_ids": ids, "attention_mask": mask}, past_key_values=second.past_key_values)
    assert torch.equal(third.sequences, over)


def test_a_reset_cache_forgets_the_pruned_prompt(family, pruned, stock):
    cache = StaticCache(config=pruned.config, max_cache_len=300)
    turn(pruned, family.inputs([FIRST]), past_key_values=cache)
    cache.reset()
    text = family.inputs(["<s>USER: no picture at all, only words. ASSISTANT:"])
    expected = stock.generate(**text, **GREEDY, eos_token_id=None)
    first = turn(pruned, text, past_key_values=cache)
    assert torch.equal(first.sequences, expected)
    ids = append(family, first.sequences, MORE)
    over = stock.generate(input_ids=ids, **GREEDY, eos_token_id=None)
    assert torch.equal(turn(pruned, {"input_ids": ids}, past_key_values=cache).sequences, over)


def test_a_turn_after_several_sequences_of_one(family, pruned):
    first = turn(pruned, family.inputs([FIRST]))
    ids = append(family, first.sequences, MORE)
    cache = first.past_key_values
    cache.batch_repeat_interleave(2)
    sampled = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4, "eos_token_id": None}
    second = pruned.generate(input_ids=ids, past_key_values=cache, return_dict_in_generate=True, **sampled)
    ids = append(family, second.sequences, MORE)
    third = turn(pruned, {"input_ids": ids}, past_key_values=second.past_key_values)
    inputs = family.inputs([FIRST])
    single = [{**inputs, "input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    assert torch.equal(third.sequences, torch.cat([turn(pruned, row).sequences for row in single]))


def test_rows_of_a_cache_that_were_moved_are_noticed(family, pruned):
    inputs = family.inputs([FIRST, FIRST], family.images(2))
    first = turn(pruned, inputs)
    ids = append(family, first.sequences, MORE)
    for change, rows in (("reorder_cache", [1, 0]), ("batch_select_indices", [1])):
        cache = copy.deepcopy(first.past_key_values)
        getattr(cache, change)(torch.tensor(rows))
        with pytest.raises(ValueError, match="reordered or selected"):
            pruned.generate(input_ids=ids[rows], past_key_values=cache, **GREEDY)
        with pytest.raises(ValueError, match="reordered or selected"):
            pruned(input_ids=ids[rows], past_key_values=cache)


ROWS = ["USER: see <image> now. ASSISTANT:", "USER: <image><image> which? ASSISTANT:", "USER: go on. ASSISTANT:"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.lists(st.sampled_from(ROWS), min_size=2, max_size=2), min_size=1, max_size=3),
    st.sampled_from(CACHE_NAMES),
    st.booleans(),
    st.integers(0, 99),
)
def test_random_turns_equal_starting_over(family, pruned, turns, name, by_forward, seed):
    """A padded batch of two conversations; every turn brings other images, or none, by `generate` or `forward`."""
    if family.name == "llava_onevision":  # a tiled image beside a prompt of several cannot go on in a batch
        turns = [[rows[0], rows[0]] if "<image>" in rows[0] else rows for rows in turns]
        turns = [[row.replace("<image><image>", "<image>") for row in rows] for rows in turns]
    images, used = family.images(12, seed), 0
    # A placeholder in an answer is an image without pixels in the next turn: stock's own limit.
    greedy = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [pruned.config.image_token_id]}
    history, mask = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0, dtype=torch.long)
    cache, by_row = None, [[], []]
    for rows in turns:
        own = []
        for row, text in enumerate(rows):
            count = text.count("<image>")
            own += images[used : used + count]
            by_row[row] += images[used : used + count]
            used += count
        new = family.inputs(rows, own)
        history, mask = torch.cat([history, new.input_ids], 1), torch.cat([mask, new.attention_mask], 1)
        every = [image for row in by_row for image in row]
        pixels = dict(family.processor.image_processor(every, return_tensors="pt")) if every else {}
        over = pruned(input_ids=history, attention_mask=mask, **pixels)
        fresh = pruned.generate(input_ids=history, attention_mask=mask, **pixels, **greedy)
        given_cache = {} if cache is None else {name: cache}
        if by_forward:
            step = pruned(input_ids=new.input_ids, attention_mask=mask, **visual(new), **given_cache, use_cache=True)
            last = [logits[-1] for logits in step.logits]
            torch.testing.assert_close(torch.stack(last), over.logits[:, -1], atol=5e-4, rtol=0)
            cache = step[CACHE]
        else:
            output = pruned.generate(
                input_ids=history,
                attention_mask=mask,
                **visual(new),
                **given_cache,
                **greedy,
                eos_token_id=None,
                return_dict_in_generate=True,
            )
            ends = fresh.shape[1]
            assert torch.equal(output.sequences[:, :ends][fresh != 0], fresh[fresh != 0])
            cache, history = output[CACHE], output.sequences
            mask = torch.cat([mask, torch.ones(2, history.shape[1] - mask.shape[1], dtype=torch.long)], dim=1)
