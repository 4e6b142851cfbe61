"""LLaVA-OneVision's videos: scored per frame after pooling, of any length, beside images, alone and in batches."""

import av
import numpy as np
import pytest
import torch

from conftest import GREEDY, make_family, visual
from transformers_rbl import PruningConfig, kept_token_count


FRAME = 4  # a 4 x 4 grid, pooled to 2 x 2
CLIP = "<s>USER: <video>\nWhat happens? ASSISTANT:"
BEAMS = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family("llava_onevision", tmp_path_factory.mktemp("video"))


@pytest.fixture(scope="module")
def stock(family):
    return family.stock()


@pytest.fixture(scope="module")
def pruned(family):
    return family.pruned()


def frames(count, seed=0):
    return np.random.RandomState(seed).randint(0, 255, (count, 40, 56, 3), dtype=np.uint8)


@pytest.fixture
def two(family):
    """Two videos of five frames and different content."""
    return family.inputs([CLIP, "<s>USER: <video>\nAnd here, please? ASSISTANT:"], videos=[frames(5, 1), frames(5, 2)])


def listed(family, lengths=(8, 5), texts=(CLIP, "<s>USER: <video>\nAnd here, please? ASSISTANT:")):
    """Videos of different lengths, which the stock processor cannot stack: prompts made one by one, then padded."""
    alone = [family.inputs([t], videos=[frames(n, seed)]) for seed, (t, n) in enumerate(zip(texts, lengths))]
    padded = family.processor.tokenizer.pad(
        [{k: one[k][0] for k in ("input_ids", "attention_mask")} for one in alone], padding_side="left"
    )
    return alone, {**padded, "pixel_values_videos": [one.pixel_values_videos[0] for one in alone]}


def new(sequences, inputs):
    return sequences[:, inputs["input_ids"].shape[1] :]


@pytest.mark.parametrize("per_frame", [True, False])
@pytest.mark.parametrize("rule", [{"keep_ratio": 0.4}, {"threshold": 0.1}, {"threshold": -1.0}], ids=str)
def test_kept_tokens_equal_a_loop_over_frames(stock, pruned, two, rule, per_frame):
    settings = PruningConfig(**rule, per_frame=per_frame)
    whole = stock.get_video_features(two.pixel_values_videos).pooler_output
    output = pruned.get_video_features(two.pixel_values_videos, pruning=settings)
    for tokens, features, mask in zip(whole, output.pooler_output, output.video_keep_masks, strict=True):
        expected = []
        patches = tokens[:-1]
        for part in patches.view(-1, FRAME, patches.shape[-1]) if per_frame else [patches]:
            book = pruned.codebook.prototypes
            scores = [max(float(torch.cosine_similarity(t, p, dim=0)) for p in book) for t in part.detach()]
            order = sorted(range(len(part)), key=lambda i, s=scores: (s[i], i))
            if "keep_ratio" in rule:
                kept = set(order[: kept_token_count(len(part), 0.4)])
            else:
                kept = {i for i in order if scores[i] < rule["threshold"]} | {order[0]}
            expected += [i in kept for i in range(len(part))]
        assert mask.tolist() == [*expected, True]  # the trailing newline stays
        torch.testing.assert_close(features, tokens[mask], atol=1e-5, rtol=0)


def test_keep_all_is_stock(stock, pruned, two):
    keep_all = PruningConfig(keep_ratio=1.0)
    torch.testing.assert_close(pruned(**two, pruning=keep_all).logits, stock(**two).logits, atol=1e-5, rtol=0)
    for kwargs in (GREEDY, BEAMS):
        assert torch.equal(pruned.generate(**two, **kwargs, pruning=keep_all), stock.generate(**two, **kwargs))
    off = PruningConfig(enabled=False)
    assert torch.equal(pruned(**two, pruning=off).logits, stock(**two).logits)
    assert torch.equal(pruned.generate(**two, **BEAMS, pruning=off), stock.generate(**two, **BEAMS))


@pytest.mark.parametrize("rule", [{"keep_ratio": 0.3}, {"threshold": 0.1}], ids=str)
@pytest.mark.parametrize("kwargs", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_two_videos_give_what_each_gives_alone(family, pruned, two, kwargs, rule):
    settings = PruningConfig(**rule)
    together = new(pruned.generate(**two, **kwargs, pruning=settings), two)
    copies = len(together) // 2
    for row, text in enumerate([CLIP, "<s>USER: <video>\nAnd here, please? ASSISTANT:"]):
        alone = family.inputs([text], videos=[frames(5, row + 1)])
        expected = new(pruned.generate(**alone, **kwargs, pruning=settings), alone)
        assert torch.equal(together[row * copies : (row + 1) * copies, : expected.shape[1]], expected)


@pytest.mark.parametrize("settings", [None, PruningConfig(threshold=0.1), PruningConfig(enabled=False)], ids=str)
@pytest.mark.parametrize("kwargs", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_a_list_of_eight_and_five_frames(family, stock, pruned, kwargs, settings):
    alone, batch = listed(family)
    together = new(pruned.generate(**batch, **kwargs, pruning=settings), batch)
    copies = len(together) // 2
    logits = pruned(**batch, pruning=settings).logits[:, -1]
    for row, one in enumerate(alone):
        off = settings is not None and not settings.enabled
        expected = new(
            (stock if off else pruned).generate(**one, **kwargs, **({} if off else {"pruning": settings})), one
        )
        assert torch.equal(together[row * copies : (row + 1) * copies, : expected.shape[1]], expected)
        torch.testing.assert_close(logits[row], pruned(**one, pruning=settings).logits[0, -1], atol=2e-4, rtol=0)


def test_cache_entries_are_exact(family, pruned):
    _, batch = listed(family)
    settings = PruningConfig(threshold=0.1)
    output = pruned.generate(**batch, **GREEDY, eos_token_id=None, pruning=settings, return_dict_in_generate=True)
    kept = [int(mask.sum()) for mask in output.video_keep_masks]
    assert [len(mask) for mask in output.video_keep_masks] == [8 * FRAME + 1, 5 * FRAME + 1]
    text = [int((ids > 4).sum() + (ids == 1).sum()) for ids in batch["input_ids"]]
    assert output.prompt_mask.sum(1).tolist() == [t + k for t, k in zip(text, kept)]
    longest = max(t + k for t, k in zip(text, kept))
    assert output.past_key_values.get_seq_length() == longest + GREEDY["max_new_tokens"] - 1


def test_image_and_video_in_one_prompt(family, stock, pruned):
    texts = ["<s>USER: <image> then <video>\nSame? ASSISTANT:", "<s>USER: <video>\nWhat? ASSISTANT:", "<s>USER: hi"]
    images, clips = family.images(1), [frames(4, 1), frames(4, 2)]
    inputs = family.inputs(texts, images, videos=clips)
    keep_all = PruningConfig(keep_ratio=1.0)
    assert torch.equal(pruned.generate(**inputs, **BEAMS, pruning=keep_all), stock.generate(**inputs, **BEAMS))
    output = pruned.generate(**inputs, **BEAMS, return_dict_in_generate=True)
    assert len(output.keep_masks) == 1 and len(output.video_keep_masks) == 2
    together = new(output.sequences, inputs).view(3, 2, -1)
    parts = [([texts[0]], images, clips[:1]), ([texts[1]], None, clips[1:]), ([texts[2]], None, None)]
    for row, (text, image, video) in enumerate(parts):
        alone = family.inputs(text, image or [], **({"videos": video} if video else {}))
        expected = new(pruned.generate(**alone, **BEAMS), alone)
        assert torch.equal(together[row, :, : expected.shape[1]], expected)


def test_the_headless_model_and_training(pruned, two):
    labels = two.input_ids.masked_fill(two.input_ids <= 4, -100)
    output = pruned(**two, labels=labels)
    assert output.loss.isfinite() and len(output.video_keep_masks) == 2
    headless = pruned.model(**two)
    torch.testing.assert_close(pruned.lm_head(headless.last_hidden_state), output.logits)
    assert headless.video_keep_masks[0].shape == (5 * FRAME + 1,)


def test_a_second_video_on_the_same_cache(family, pruned):
    first = family.inputs([CLIP], videos=[frames(4, 1)])
    answer = pruned.generate(**first, **GREEDY, eos_token_id=None, return_dict_in_generate=True)
    question = family.inputs(["USER: <video>\nand this? ASSISTANT:"], videos=[frames(6, 2)])
    ids = torch.cat([answer.sequences, question.input_ids], dim=1)
    both = [first.pixel_values_videos[0], question.pixel_values_videos[0]]
    expected = pruned.generate(input_ids=ids, pixel_values_videos=both, **GREEDY)
    for videos in (both, question.pixel_values_videos):
        again = pruned.generate(**first, **GREEDY, eos_token_id=None, return_dict_in_generate=True).past_key_values
        encoded = []
        hook = pruned.model.vision_tower.register_forward_pre_hook(
            lambda m, args, log=encoded: log.append(len(args[0]))
        )
        got = pruned.generate(input_ids=ids, pixel_values_videos=videos, past_key_values=again, **GREEDY)
        hook.remove()
        assert torch.equal(got, expected) and encoded == [6]


def test_a_clip_from_a_file(family, stock, pruned, tmp_path):
    """A real MP4, written and decoded with PyAV."""
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(8):
            picture = np.full((48, 64, 3), 20 * k, dtype=np.uint8)
            picture[8 * (k % 4) : 8 * (k % 4) + 12, 10:30] = (255, 80, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "clip.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 8
    conversation = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}]
    text = family.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    inputs = family.inputs([text], videos=[np.stack(decoded[::2] + decoded[-1:])])
    assert inputs.pixel_values_videos.shape[:2] == (1, 5)
    keep_all = PruningConfig(keep_ratio=1.0)
    assert torch.equal(pruned.generate(**inputs, **GREEDY, pruning=keep_all), stock.generate(**inputs, **GREEDY))
    output = pruned.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    assert output.video_keep_masks[0].sum() == 5 * round(FRAME * 0.3) + 1


def test_wrong_videos_get_a_sentence(family, pruned, two):
    for run in (pruned, pruned.generate):
        with pytest.raises(ValueError, match="placeholders, but its 1 video"):
            run(**{**two, "pixel_values_videos": two.pixel_values_videos[:1]})
        with pytest.raises(ValueError, match="a list of"):
            run(**{**two, "pixel_values_videos": [two.pixel_values_videos[0, 0], two.pixel_values_videos[1, 0]]})
        with pytest.raises(ValueError, match="middle of a video"):
            run(**{**listed(family)[1], "pixel_values_videos": listed(family)[1]["pixel_values_videos"][::-1]})


def test_random_scores_differ_from_frame_to_frame(pruned, two):
    mask = pruned(**two, pruning=PruningConfig(keep_ratio=0.5, score="random", seed=1)).video_keep_masks
    assert torch.equal(mask[0], mask[1])  # whatever the batch
    assert len({tuple(frame) for frame in mask[0][:-1].view(-1, FRAME).tolist()}) > 1


def test_features_encoded_beforehand(pruned, two):
    features = pruned.get_video_features(two.pixel_values_videos)
    text = {key: two[key] for key in two if key not in visual(two)}
    expected = pruned.generate(**two, **BEAMS)
    assert torch.equal(pruned.generate(**text, **BEAMS, mm_encoder_outputs={"video": features}), expected)


def test_a_list_needs_no_pruning_settings(family, stock):
    """Videos of different lengths in a model that prunes nothing."""
    model = family.rbl_class.from_pretrained(family.folder).eval()
    alone, batch = listed(family)
    together = new(model.generate(**batch, **GREEDY), batch)
    for row, one in enumerate(alone):
        expected = new(stock.generate(**one, **GREEDY), one)
        assert torch.equal(together[row : row + 1, : expected.shape[1]], expected)
