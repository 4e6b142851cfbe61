"""Contracts 4 and 6: stock-shaped answers from every decoding mode."""

import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import utils as generation_utils
from transformers.generation.streamers import BaseStreamer

from conftest import GREEDY, TEXTS, visual
from transformers_rbl import PruningConfig


KEEP = PruningConfig(keep_ratio=0.3)


def new_tokens(sequences, inputs):
    return sequences[:, inputs.input_ids.shape[1] :]


def test_sequences_begin_with_the_original_prompt(pruned, batch):
    for kwargs in (GREEDY, {**GREEDY, "num_beams": 2}, {**GREEDY, "num_beams": 3, "num_return_sequences": 3}):
        sequences = pruned.generate(**batch, **kwargs)
        copies = len(sequences) // len(batch.input_ids)
        prompt = batch.input_ids.repeat_interleave(copies, dim=0)
        assert torch.equal(sequences[:, : prompt.shape[1]], prompt)
        assert sequences.shape[1] > prompt.shape[1]


MODES = {
    "sampling": {"do_sample": True, "max_new_tokens": 6, "top_k": 20},
    "several samples": {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 3},
    "beams": {"do_sample": False, "max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "max_new_tokens": 6, "num_beams": 2},
    "static cache": {**GREEDY, "cache_implementation": "static"},
    "no cache": {**GREEDY, "use_cache": False},
    "repetition penalty": {**GREEDY, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "bad words": {**GREEDY, "bad_words_ids": [[160]], "min_new_tokens": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_gives_what_the_stock_model_gives_on_the_kept_embeddings(stock, pruned, oracle, one, mode):
    """The oracle's embeddings through stock `generate`, in the same mode with the same seed."""
    embeds, positions = oracle.embed(one, 0, KEEP)
    kwargs = GREEDY if mode == "no cache" else MODES[mode]  # stock always caches embeddings
    torch.manual_seed(0)
    expected = stock.generate(input_ids=one.input_ids[:, positions], inputs_embeds=embeds, **kwargs)
    torch.manual_seed(0)
    sequences = pruned.generate(**one, **MODES[mode])
    assert torch.equal(new_tokens(sequences, one), expected[:, len(positions) :])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_of_the_users(stock, pruned, one, cache):
    config = pruned.config.get_text_config()
    own = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=80)
    sequences = pruned.generate(**one, **GREEDY, past_key_values=own)
    assert torch.equal(sequences, pruned.generate(**one, **GREEDY))
    assert int(own.get_seq_length()) < one.input_ids.shape[1]


def test_a_static_cache_is_allocated_for_the_compact_prompt(pruned, one):
    output = pruned.generate(**one, **GREEDY, cache_implementation="static", return_dict_in_generate=True)
    slots = output.past_key_values.layers[0].keys.shape[2]
    assert slots == int(output.prompt_mask.sum()) + GREEDY["max_new_tokens"] - 1


def test_beams_on_a_batch_equal_each_row_alone(family, pruned, batch):
    kwargs = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    together = new_tokens(pruned.generate(**batch, **kwargs), batch).view(len(TEXTS), 2, -1)
    images, used = family.images(4), 0
    for row, text in enumerate(TEXTS):
        count = text.count("<image>")
        alone = family.inputs([text], images[used : used + count])
        used += count
        expected = new_tokens(pruned.generate(**alone, **kwargs), alone)
        assert torch.equal(together[row, :, : expected.shape[1]], expected)


chunked_needs_new = pytest.mark.skipif(
    not hasattr(generation_utils, "_slice_mm_encoder_output"),
    reason="transformers 5.19 cannot split images over chunks",
)


@chunked_needs_new
@pytest.mark.parametrize("chunk", [5, 16, 1000])
def test_chunked_prefill(pruned, one, chunk):
    assert torch.equal(pruned.generate(**one, **GREEDY, prefill_chunk_size=chunk), pruned.generate(**one, **GREEDY))


def test_chunked_prefill_raises_where_stock_is_silently_wrong(pruned, one, monkeypatch):
    monkeypatch.delattr(generation_utils, "_slice_mm_encoder_output", raising=False)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        pruned.generate(**one, **GREEDY, prefill_chunk_size=5)


def test_prompt_lookup(family, pruned):
    inputs = family.inputs(["<s>abc: abc: abc: <image>\nabc: ASSISTANT:"])
    expected = pruned.generate(**inputs, **GREEDY)
    assert torch.equal(pruned.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("assistant", ["stock", "pruned"])
def test_assisted_decoding(stock, pruned, one, assistant):
    assistant = {"stock": stock, "pruned": pruned}[assistant]
    expected = pruned.generate(**one, **GREEDY)
    assert torch.equal(pruned.generate(**one, **GREEDY, assistant_model=assistant), expected)


def test_inputs_embeds(pruned, one):
    embeds = pruned.get_input_embeddings()(one.input_ids)
    expected = new_tokens(pruned.generate(**one, **GREEDY), one)
    assert torch.equal(pruned.generate(inputs_embeds=embeds, **visual(one), **GREEDY), expected)
    both = pruned.generate(input_ids=one.input_ids, inputs_embeds=embeds, **visual(one), **GREEDY)
    assert torch.equal(new_tokens(both, one), expected)
    logits = pruned(inputs_embeds=embeds, **visual(one)).logits
    torch.testing.assert_close(logits, pruned(**one).logits)


def test_features_encoded_beforehand(pruned, one):
    expected = pruned.generate(**one, **GREEDY)
    features = pruned.get_image_features(**visual(one))
    text = {"input_ids": one.input_ids, "attention_mask": one.attention_mask}
    assert torch.equal(pruned.generate(**text, **GREEDY, mm_encoder_outputs={"image": features}), expected)
    torch.testing.assert_close(pruned(**text, mm_encoder_outputs={"image": features}).logits, pruned(**one).logits)
    with pytest.raises(ValueError, match="encoded already"):
        pruned.generate(**text, mm_encoder_outputs={"image": features}, pruning=KEEP)


@pytest.mark.parametrize("where", ["argument", "generation_config", "model"])
def test_max_and_min_length_count_the_original_prompt(family, one, where):
    model = family.pruned()
    lengths = {"max_length": one.input_ids.shape[1] + 5, "min_length": one.input_ids.shape[1] + 5, "do_sample": False}
    if where == "argument":
        sequences = model.generate(**one, **lengths)
    elif where == "generation_config":
        sequences = model.generate(**one, generation_config=type(model.generation_config)(**lengths, eos_token_id=2))
    else:
        model.generation_config.update(**lengths)
        sequences = model.generate(**one)
    assert sequences.shape[1] == one.input_ids.shape[1] + 5


@pytest.mark.parametrize("settings", [KEEP, PruningConfig(enabled=False)], ids=["pruned", "off"])
def test_a_setting_that_is_none_is_a_setting(family, one, settings):
    """`eos_token_id=None` switches the model's own off."""
    model = family.pruned()
    told = new_tokens(model.generate(**one, **GREEDY, eos_token_id=None, pruning=settings), one)
    model.generation_config.eos_token_id = int(told[0, 2])
    assert new_tokens(model.generate(**one, **GREEDY, pruning=settings), one).shape[1] <= 3
    assert torch.equal(new_tokens(model.generate(**one, **GREEDY, eos_token_id=None, pruning=settings), one), told)


def test_default_length_is_twenty_new_tokens(stock, pruned, batch):
    with pytest.warns(UserWarning, match="max_new_tokens"):
        length = pruned.generate(**batch, do_sample=False, eos_token_id=None).shape[1]
    assert length == batch.input_ids.shape[1] + 20


class Recorder(LogitsProcessor):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        return scores


class NeverStop(StoppingCriteria):
    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.clone())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("beams", [1, 2])
def test_processors_and_criteria_see_the_original_prompt(pruned, batch, beams):
    processor, criterion = Recorder(), NeverStop()
    pruned.generate(
        **batch,
        **GREEDY,
        num_beams=beams,
        logits_processor=[processor],
        stopping_criteria=StoppingCriteriaList([criterion]),
    )
    length = batch.input_ids.shape[1]
    assert processor.seen and criterion.seen
    for seen in processor.seen + criterion.seen:
        copies = len(seen) // len(batch.input_ids)
        assert torch.equal(seen[:, :length], batch.input_ids.repeat_interleave(copies, dim=0))
    assert processor.seen[2].shape[1] == length + 2


def test_a_users_own_max_length_criterion_counts_the_original_prompt(pruned, one):
    length = one.input_ids.shape[1]
    sequences = pruned.generate(
        **one,
        do_sample=False,
        eos_token_id=None,
        stopping_criteria=[MaxLengthCriteria(length + 25)],
        max_length=length + 3,
    )
    assert sequences.shape[1] == length + 25  # as in stock, it replaces the default one


def test_a_users_processor_replaces_the_default_of_its_type(stock, pruned, one):
    own = RepetitionPenaltyLogitsProcessor(penalty=1.0)
    assert torch.equal(
        pruned.generate(**one, **GREEDY, repetition_penalty=50.0, logits_processor=[own]),
        pruned.generate(**one, **GREEDY),
    )


def test_prefix_function_sees_the_original_prompt(pruned, batch):
    seen = []

    def allowed(batch_id, sequence):
        seen.append(torch.equal(sequence[: batch.input_ids.shape[1]], batch.input_ids[batch_id]))
        return [40 + batch_id]

    sequences = pruned.generate(**batch, **GREEDY, num_beams=2, prefix_allowed_tokens_fn=allowed)
    assert all(seen) and seen
    assert new_tokens(sequences, batch).tolist() == [[40 + row] * 8 for row in range(4)]


def test_prefix_function_with_several_samples(pruned, batch):
    seen = []

    def allowed(batch_id, sequence):
        seen.append(torch.equal(sequence[: batch.input_ids.shape[1]], batch.input_ids[batch_id // 2]))
        return [50]

    pruned.generate(**batch, do_sample=True, max_new_tokens=2, num_return_sequences=2, prefix_allowed_tokens_fn=allowed)
    assert len(seen) == 16 and all(seen)


def test_streamers_get_the_original_prompt_then_tokens(pruned, one):
    class Streamer(BaseStreamer):
        chunks, ended = [], False

        def put(self, value):
            self.chunks.append(value)

        def end(self):
            self.ended = True

    streamer = Streamer()
    sequences = pruned.generate(**one, **GREEDY, streamer=streamer)
    assert streamer.ended and torch.equal(streamer.chunks[0], one.input_ids)
    assert torch.cat([chunk.flatten() for chunk in streamer.chunks]).tolist() == sequences[0].tolist()


def test_right_padded_generation_follows_stock(family, stock, pruned, caplog):
    inputs = family.inputs(TEXTS, family.images(4), side="right")
    settings = PruningConfig(keep_ratio=1.0)
    assert torch.equal(pruned.generate(**inputs, **GREEDY, pruning=settings), stock.generate(**inputs, **GREEDY))


def test_a_missing_attention_mask_is_inferred_as_stock_does(pruned, batch):
    without = {key: value for key, value in batch.items() if key != "attention_mask"}
    assert torch.equal(pruned.generate(**without, **GREEDY), pruned.generate(**batch, **GREEDY))


def test_low_precision(family, one):
    for dtype in (torch.bfloat16, torch.float16):
        model = family.pruned(dtype=dtype)
        assert model.codebook.prototypes.dtype == torch.float32 and model.lm_head.weight.dtype == dtype
        output = model.generate(**one, **GREEDY, return_dict_in_generate=True)
        assert sum(int(mask.sum()) for mask in output.keep_masks) < sum(len(mask) for mask in output.keep_masks)


def test_two_threads_share_a_model(family, pruned):
    """Contract 7: nothing of a call is kept on the module."""
    settings = [PruningConfig(keep_ratio=0.2), PruningConfig(keep_ratio=0.7)]
    inputs = [family.inputs(TEXTS[:1], family.images(1, seed)) for seed in (1, 2)]
    expected = [pruned.generate(**i, **GREEDY, pruning=s) for i, s in zip(inputs, settings)]
    state = {name: id(value) for name, value in vars(pruned.model).items()}
    wrong = []

    def work(k):
        for _ in range(5):
            if not torch.equal(pruned.generate(**inputs[k], **GREEDY, pruning=settings[k]), expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert state == {name: id(value) for name, value in vars(pruned.model).items()}


def test_custom_generate_from_a_repository_and_paged_caches_raise(pruned, one):
    with pytest.raises(ValueError, match="custom_generate"):
        pruned.generate(**one, custom_generate="org/repo")
    with pytest.raises(ValueError, match="paged"):
        pruned.generate(**one, cache_implementation="paged")


def test_text_only_prompts_are_stock(family, stock, pruned):
    inputs = family.inputs(TEXTS[3:], [])
    assert torch.equal(pruned.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))


def test_a_typo_is_caught_as_in_stock(pruned, one):
    with pytest.raises(ValueError, match="keep_ration"):
        pruned.generate(**one, keep_ration=0.5)
    with pytest.raises(TypeError):
        pruned(*([None] * 30))


def test_settings_per_call_as_a_dict(family, pruned, one):
    assert torch.equal(
        pruned.generate(**one, **GREEDY, pruning={"keep_ratio": 0.5}),
        pruned.generate(**one, **GREEDY, pruning=PruningConfig(keep_ratio=0.5)),
    )
    for inputs in (one, family.inputs(TEXTS[3:], [])):  # of a prompt without images, too
        with pytest.raises(ValueError, match="Unknown pruning setting"):
            pruned.generate(**inputs, pruning={"ratio": 0.5})
        with pytest.raises(ValueError, match="Unknown pruning setting"):
            pruned(**inputs, pruning={"ratio": 0.5})


def test_a_compiled_language_model(family, pruned, one):
    model = family.pruned()
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    assert torch.equal(model.generate(**one, **GREEDY), pruned.generate(**one, **GREEDY))


def test_models_do_not_share_a_codebook(family):
    first, second = family.pruned(), family.pruned()
    assert first.codebook is not second.codebook and first.codebook is not family.codebook


class _Placeholder(LogitsProcessor):
    """Whatever the model says, the next token is a placeholder."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([self.token]), 0.0)


def test_a_placeholder_that_the_model_says_gets_stocks_sentence_without_a_cache(family, stock, pruned, one):
    said = {"logits_processor": [_Placeholder(pruned.config.image_token_id)], "use_cache": False}
    with pytest.raises(ValueError) as expected:
        stock.generate(**one, **GREEDY, **said)
    with pytest.raises(ValueError) as error:
        pruned.generate(**one, **GREEDY, **said)
    assert str(error.value).split(",")[0] == str(expected.value).split(",")[0]
    torch.testing.assert_close(pruned.generate(**one, **GREEDY, use_cache=False), pruned.generate(**one, **GREEDY))
