"""Rules of other papers against loops written from them, and the attention that they read against stock's own."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

import small_families
from conftest import GREEDY, TEXTS, make_family, visual
from test_greedy import KINDS, dpp_cost, tokens_of, unit
from transformers_rbl import PruningConfig
from transformers_rbl.evaluation.evaluate import prompt_inputs
from transformers_rbl.evaluation.questions import Question
from transformers_rbl.models.greedy import COVERED
from transformers_rbl.models.layout import NEWLINE
from transformers_rbl.models.scorers import score_images, score_tokens
from transformers_rbl.models.seam import Call
from transformers_rbl.models.tower import queries_and_keys, received_attention


LENGTH = 24
ATTENTION = ["cls_attention", "visionzip", "vispruner", "prumerge", "scope"]


def given(kind, length=LENGTH):
    """Tokens, attention and keys, with ties in all of them where tokens have ties; and a question."""
    generator = torch.Generator().manual_seed(5)
    attention = torch.randn(length, generator=generator).softmax(0)
    keys = torch.randn(length, 2, 6, generator=generator)
    if kind == "duplicates":
        attention[length // 2 :], keys[length // 2 :] = attention[: length // 2], keys[: length // 2]
    elif kind == "all equal":
        attention, keys = torch.full((length,), 1 / length), keys[:1].expand(length, -1, -1).clone()
    question = torch.randn(5, 64, generator=generator)
    return {"tokens": tokens_of(kind, length), "cls_attention": attention, "tower_keys": keys, "question": question}


def most_attended(attention):
    return sorted(range(len(attention)), key=lambda i: (-float(attention[i]), i))


def assert_one_of_the_nearest(weights, row, token, candidates, vectors):
    """Of equal cosines rounding may take another: what was taken is as near as the nearest."""
    cosine = unit(vectors)[token] @ unit(vectors)[candidates].T
    assert cosine[row] == pytest.approx(cosine.max(), abs=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 16, LENGTH])
@pytest.mark.parametrize("kind", KINDS)
class TestLoops:
    def test_visionzip(self, kind, count):
        own = given(kind)
        choice = score_tokens("visionzip", count=count, **own)
        contextual = round(count * 10 / 64)
        ranked = most_attended(own["cls_attention"])
        dominant, others = ranked[: count - contextual], sorted(ranked[count - contextual :])
        step = max(1, len(others) // max(1, contextual))
        targets = [others[k * step] for k in range(contextual)]
        stay = sorted(dominant + targets)
        assert choice.kept.nonzero()[:, 0].tolist() == stay
        keys, row_of = own["tower_keys"].mean(1), {token: row for row, token in enumerate(stay)}
        came = {target: [] for target in targets}
        for token in [token for token in others if token not in targets] if targets else []:
            (row,) = choice.weights[:, token].nonzero()[:, 0].tolist()
            assert_one_of_the_nearest(choice.weights, targets.index(stay[row]), token, targets, keys)
            came[stay[row]].append(token)
        expected = torch.zeros(count, LENGTH)
        for token in stay:
            mates = came.get(token, [])
            expected[row_of[token], token] = 0.5 if mates else 1.0
            expected[row_of[token], mates] = 0.5 / max(1, len(mates))
        torch.testing.assert_close(choice.weights, expected)

    def test_vispruner(self, kind, count):
        own = given(kind)
        kept = score_tokens("vispruner", count=count, **own).kept
        ranked = most_attended(own["cls_attention"])
        important, rest = ranked[: count // 2], ranked[count // 2 :]
        cosine = unit(own["tokens"]) @ unit(own["tokens"]).T
        diverse = count - count // 2
        while len(rest) > diverse:
            first, second = rest[::2], rest[1::2]
            near = {token: max(cosine[token, other] for other in second) for token in first}
            order = sorted(first, key=lambda token: -round(near[token], 5))  # stable: ties keep their rank
            rest = order[min(8, len(rest) - diverse) :] + second
        if kind in ("random", "bfloat16"):  # elsewhere rounding decides which of equal tokens goes
            assert sorted(important + rest) == kept.nonzero()[:, 0].tolist()
        assert kept[important].all() and kept.sum() == count

    def test_prumerge(self, kind, count):
        own = given(kind)
        choice = score_tokens("prumerge", count=count, **own)
        stay = sorted(most_attended(own["cls_attention"])[:count])
        assert choice.kept.nonzero()[:, 0].tolist() == stay
        cosine = unit(own["tower_keys"].flatten(1)) @ unit(own["tower_keys"].flatten(1)).T
        for row, token in enumerate(stay):
            others = [other for other in range(LENGTH) if other != token]
            near = sorted(others, key=lambda other: -cosine[token, other])[:32]
            expected = torch.zeros(LENGTH)
            expected[near] = own["cls_attention"][near]
            expected[token] = 1.0
            torch.testing.assert_close(choice.weights[row], expected / expected.sum())

    def test_scope(self, kind, count):
        own = given(kind)
        cosine, attention = unit(own["tokens"]) @ unit(own["tokens"]).T, own["cls_attention"].double()
        saliency = (attention / attention.max()).tolist()

        def cost(token, chosen):
            before = [max([0, *(cosine[k, j] for j in chosen)]) for k in range(LENGTH)]
            gain = sum(max(0, cosine[k, token] - before[k]) for k in range(LENGTH)) / LENGTH
            return -saliency[token] * gain if gain > COVERED else 1 - saliency[token]

        replay(score_tokens("scope", count=count, **own), count, cost)

    def test_cdpruner(self, kind, count):
        own = given(kind)
        direction = unit(own["tokens"])
        relevance = (direction @ unit(own["question"]).T).mean(1)
        low, high = relevance.min(), relevance.max()
        relevance = (relevance - low + 1e-6) / (high - low + 1e-6)

        if kind != "all equal":  # there the relevance is rounding error, scaled up
            replay(score_tokens("cdpruner", count=count, **own), count, dpp_cost(direction, relevance))

    def test_tome(self, kind, count):
        own = given(kind)
        choice = score_tokens("tome", count=count, **own)
        values = {token: (own["tokens"][token].double(), [token]) for token in range(LENGTH)}
        while len(values) > count:
            alive = sorted(values)
            first, second = alive[::2], alive[1::2]
            means = {token: values[token][0] / len(values[token][1]) for token in alive}
            pair = {a: max(second, key=lambda b, a=a: cosine(means[a], means[b])) for a in first}
            order = sorted(first, key=lambda a: -round(cosine(means[a], means[pair[a]]), 5))
            for a in order[: min(len(alive) - count, len(second))]:
                total, members = values.pop(a)
                values[pair[a]] = (values[pair[a]][0] + total, values[pair[a]][1] + members)
        assert choice.kept.sum() == count
        torch.testing.assert_close(choice.weights.sum(1), torch.ones(count))
        assert ((choice.weights > 0).sum(0) == 1).all()  # every token is in exactly one
        if kind in ("random", "bfloat16"):
            assert choice.kept.nonzero()[:, 0].tolist() == sorted(values)
            for row, token in enumerate(sorted(values)):
                assert choice.weights[row].nonzero()[:, 0].tolist() == sorted(values[token][1])


def cosine(a, b):
    return float(torch.cosine_similarity(a, b, dim=0))


def replay(scores, count, cost):
    """Every choice is the best that the loop has, but for float32's rounding."""
    order, chosen = scores.argsort(stable=True)[:count].tolist(), []
    assert int(scores.isfinite().sum()) == count
    for pick in order:
        best = min(cost(token, chosen) for token in range(LENGTH) if token not in chosen)
        assert cost(pick, chosen) == pytest.approx(best, abs=2e-5)
        chosen.append(pick)


def test_a_prompt_without_text_makes_all_tokens_as_relevant():
    own = given("random")
    own["question"] = own["question"][:0]
    replaced = {"tokens": own["tokens"], "count": 9, "question": torch.ones(1, 64) * 0}
    assert torch.equal(score_tokens("cdpruner", **own, count=9), score_tokens("cdpruner", **replaced))


@pytest.mark.parametrize("name", ["scope", "cdpruner"])
def test_images_scored_together_are_scored_as_if_alone(name):
    images = [{**given(kind), "count": 9} for kind in ("random", "zeros", "few dimensions")]
    for one, together in zip(images, score_images(name, images), strict=True):
        torch.testing.assert_close(together, score_tokens(name, **one), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["cls_attention", "scope", "cdpruner"])
def test_the_order_of_tokens_changes_nothing_but_the_order(name):
    own, order = given("random"), torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))
    moved = {key: value if key == "question" else value[order] for key, value in own.items()}
    kept, theirs = (score_tokens(name, **each, count=9).argsort(stable=True)[:9] for each in (own, moved))
    assert set(order[theirs].tolist()) == set(kept.tolist())


def test_prumerge_depends_on_no_order():
    own, order = given("random"), torch.randperm(LENGTH, generator=torch.Generator().manual_seed(1))
    choice = score_tokens("prumerge", **own, count=9)
    moved = score_tokens("prumerge", **{k: v if k == "question" else v[order] for k, v in own.items()}, count=9)
    assert torch.equal(choice.kept[order], moved.kept)
    merged = {tuple(row.tolist()) for row in (choice.weights @ own["tokens"]).round(decimals=3)}
    assert merged == {tuple(row.tolist()) for row in (moved.weights @ own["tokens"][order]).round(decimals=3)}


# --- through models ---------------------------------------------------------------------------------------------------


def stock_attention(family, pixels, layer):
    """`(tiles, tokens)` that stock's own eager attention gives, heads averaged: from [cls], or from all on average."""
    tower = family.stock(attn_implementation="eager").model.vision_tower
    attention = tower(pixels, output_attentions=True).attentions[layer].mean(1)
    return attention[:, 0, 1:] if tower.config.model_type.startswith("clip") else attention.mean(1)


@pytest.mark.parametrize("layer", [-2, -1, 1])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_attention_is_that_of_the_layer_that_the_projector_reads(tmp_path, tower, layer):
    family = make_family("llava", tmp_path, tower=tower, vision_feature_layer=layer,
                         vision_feature_select_strategy="default" if tower == "clip" else "full")  # fmt: skip
    inputs, model = family.inputs(["<s> <image>"], family.images(1)), family.pruned()
    number = layer - 1 if layer > 0 else layer  # hidden_states[i] is the output of layer i - 1
    expected = stock_attention(family, inputs.pixel_values, number)[0]
    states = model.get_image_features(
        pixel_values=inputs.pixel_values, output_hidden_states=True, pruning=PruningConfig(enabled=False),
        return_dict=True,
    ).hidden_states  # fmt: skip
    received = received_attention(*queries_and_keys(model.model.vision_tower, states, layer), tower == "clip")[0]
    torch.testing.assert_close(received[1:] if tower == "clip" else received, expected)
    assert received.sum() == pytest.approx(1, abs=1e-5)
    kept = model(**inputs, pruning=PruningConfig(keep_ratio=0.25, score="cls_attention")).keep_masks[0]
    assert set(kept.nonzero()[:, 0].tolist()) == set(expected.topk(4).indices.tolist())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.vision_tower.modules()
                   if type(module).__name__ in ("Linear", "LayerNorm"))  # fmt: skip


def test_attention_of_tiles_is_each_tiles_own_and_lies_as_tokens_do(family, pruned, one):
    """Tiles, row ends, OneVision's SigLIP; base images alone are as the base of the whole."""
    pixels = one.pixel_values[0] if one.pixel_values.ndim == 5 else one.pixel_values
    received = stock_attention(family, pixels, -2 if family.name != "llava_onevision" else -1)
    kinds = pruned.model.token_kinds(**visual(one))[0]
    packed = pruned.model.family.laid_out(pruned.model, "image", received[..., None], visual(one), False)[0][:, 0]
    rule = PruningConfig(keep_ratio=0.25, score="cls_attention")
    kept = pruned(**one, pruning=rule).keep_masks[0]
    scored = kinds != NEWLINE
    cut = packed[scored].sort().values[-int(kept[scored].sum())]
    assert torch.equal(kept[scored], packed[scored] >= cut - 1e-7)
    base = pruned(**one, pruning=PruningConfig(keep_ratio=0.25, score="cls_attention", tiles="base")).keep_masks[0]
    assert set(base[:16].nonzero()[:, 0].tolist()) == set(received[0].topk(4).indices.tolist())


@pytest.mark.parametrize("name", ["cls_attention", "visionzip", "scope"])
def test_calls_at_the_same_time_do_not_mix(family, pruned, name):
    rule = PruningConfig(keep_ratio=0.3, score=name)
    prompts = [family.inputs([text], [image]) for text, image in zip(TEXTS[:2] * 4, family.images(8))]
    alone = [pruned(**inputs, pruning=rule).logits for inputs in prompts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda inputs: pruned(**inputs, pruning=rule).logits, prompts))
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("name", ATTENTION)
def test_features_pruned_afterwards_equal_features_pruned_at_once(family, pruned, batch, name):
    rule, off = PruningConfig(keep_ratio=0.3, score=name), PruningConfig(enabled=False)
    encoded = pruned.get_image_features(**visual(batch), output_hidden_states=True, pruning=off, return_dict=True)
    after = pruned.model.prune_image_features(encoded, rule, **visual(batch))
    at_once = pruned.get_image_features(**visual(batch), pruning=rule, return_dict=True)
    assert all(map(torch.equal, after.keep_masks, at_once.keep_masks))
    for one, other in zip(after.pooler_output, at_once.pooler_output, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_question_is_the_text_of_the_images_own_prompt(family, pruned, batch):
    """Padding, placeholders and labels are none of it; ids and embeddings give the same."""
    rule = PruningConfig(keep_ratio=0.3, score="cdpruner")
    output, images = pruned(**batch, pruning=rule), family.images(4)
    embeds = pruned.get_input_embeddings()
    singles = [(TEXTS[0], images[:1]), (TEXTS[1], images[1:2]), (TEXTS[2], images[2:4])]
    masks = iter(output.keep_masks)
    for text, own in singles:
        alone = family.inputs([text], own)
        for mask in pruned(**alone, pruning=rule).keep_masks:
            assert torch.equal(mask, next(masks))
        ids = alone.input_ids[0]
        texts = pruned.prompt_texts("image", pruned_call(alone))
        assert torch.equal(texts[0][2], embeds(ids[ids != pruned.config.image_token_id]))
        assert texts[0][0] == int((ids == pruned.config.image_token_id).sum())
    alone = family.inputs([TEXTS[1]], images[1:2])
    other = family.inputs(["<s>USER: <image>\nsomething else entirely, at length? ASSISTANT:"], images[1:2])
    labels = alone.input_ids.clone()
    labels[:, :-4] = -100
    labelled = pruned.prompt_texts("image", pruned_call({**alone, "labels": labels}))[0][2]
    assert len(labelled) == len(pruned.prompt_texts("image", pruned_call(alone))[0][2]) - 4
    masks = [pruned(**inputs, pruning=rule).keep_masks[0] for inputs in (alone, other)]
    assert masks[0].sum() == masks[1].sum()


def pruned_call(inputs):
    return Call.read(dict(inputs))


def test_rules_that_read_the_question_are_refused_where_features_outlive_it(family, pruned, one, tmp_path):
    rule = PruningConfig(keep_ratio=0.3, score="cdpruner")
    with pytest.raises(ValueError, match="reads the question, and features that are encoded apart from a prompt"):
        pruned.get_image_features(**visual(one), pruning=rule)
    first = pruned.generate(**one, **GREEDY, pruning=rule, return_dict_in_generate=True)
    cache = first.past_key_values
    ids = torch.cat([first.sequences, one.input_ids[:, -5:]], dim=1)
    with pytest.raises(ValueError, match="chosen by the question before"):
        pruned.generate(input_ids=ids, past_key_values=cache, **GREEDY, pruning=rule)
    again = pruned.generate(input_ids=ids, past_key_values=cache, **GREEDY)  # another rule goes on
    assert again.shape[1] > ids.shape[1]
    with pytest.raises(ValueError, match="chosen by the question before"):
        pruned(
            input_ids=one.input_ids[:, -5:], past_key_values=pruned(**one, pruning=rule).past_key_values, pruning=rule
        )
    output = pruned(**one, pruning=rule)  # one token at a time is the same question
    step = {"input_ids": output.logits[:, -1:].argmax(-1), "past_key_values": output.past_key_values}
    assert pruned(**step, pruning=rule).logits.shape[1] == 1


def test_towers_that_hand_out_no_attention_are_refused_in_a_sentence(family, pruned, one):
    rule, off = PruningConfig(keep_ratio=0.3, score="scope"), PruningConfig(enabled=False)
    with pytest.raises(ValueError, match="hidden state 0 of the vision tower is no layer's output"):
        pruned.get_image_features(**visual(one), vision_feature_layer=0, pruning=rule)
    encoded = pruned.get_image_features(**visual(one), pruning=off, return_dict=True)
    encoded["hidden_states"] = tuple(None for _ in encoded.hidden_states)  # as the newest release leaves them out
    with pytest.raises(ValueError, match=r"score='scope': cls_attention cannot.*pass output_hidden_states=True"):
        pruned.model.prune_image_features(encoded, rule, **visual(one))
    with pytest.raises(ValueError, match="CLIPEncoderLayer or SiglipEncoderLayer, and Linear is none"):
        queries_and_keys(torch.nn.Linear(2, 2), (), -2)


def test_families_without_towers_of_this_kind_say_so(tmp_path):
    family = small_families.family(tmp_path, "qwen2_5_vl")
    model = family.pruned(keep_ratio=0.3)
    inputs = prompt_inputs(family.processor, Question(small_families.photos(1), "What?", []), "", "cpu", model.dtype)
    with pytest.raises(ValueError, match="score='prumerge': cls_attention and tower_keys of the vision tower"):
        model(**inputs, pruning=PruningConfig(keep_ratio=0.3, score="prumerge"))
    assert model(**inputs, pruning=PruningConfig(keep_ratio=0.3, score="cdpruner")).keep_masks
    assert model(**inputs, pruning=PruningConfig(keep_ratio=0.3, score="tome")).keep_masks


def test_prumerge_takes_in_32_of_many():
    weights = score_tokens("prumerge", **given("random", length=60), count=5).weights
    assert (weights > 0).sum(1).tolist() == [33] * 5


@torch.no_grad()
def test_a_row_is_pruned_by_its_own_question_behind_a_cache(family, pruned):
    """Whole prompts with all their images, on a cache that was filled without pruning: a batch is its rows, and the
    question is what follows the cache, whether what it holds is given again or not."""
    if family.name == "llava_onevision":
        pytest.skip("an image has other tiles in a prompt of one than in a prompt of two")
    rule, off = PruningConfig(keep_ratio=0.3, score="cdpruner"), PruningConfig(enabled=False)
    images = [family.images(1, seed)[0] for seed in range(4)]
    before = [family.inputs([f"<s>USER: <image> {word}? ASSISTANT:"], [images[i]]) for i, word in enumerate("ab")]
    texts = " USER: <image> how many are red? ASSISTANT:", " USER: <image> what size is it, then? ASSISTANT:"
    after = [family.inputs([text], [images[i + 2]]) for i, text in enumerate(texts)]
    shortest = min(turn["input_ids"].shape[1] for turn in after)
    new = [turn["input_ids"][:, :shortest] for turn in after]

    def kept(rows, whole=True):
        first = {name: torch.cat([before[row][name] for row in rows]) for name in before[0]}
        cache = DynamicCache(config=pruned.config.get_text_config())
        pruned(**first, past_key_values=cache, use_cache=True, pruning=off)
        own = torch.cat([new[row] for row in rows])
        ids = torch.cat([first["input_ids"], own], dim=1)
        shown = [turn[row] for row in rows for turn in ((before, after) if whole else (after,))]
        output = pruned.generate(
            input_ids=ids if whole else own,
            attention_mask=torch.ones_like(ids),
            **{name: torch.cat([turn[name] for turn in shown]) for name in visual(after[0])},
            past_key_values=cache, pruning=rule, max_new_tokens=1, return_dict_in_generate=True,
        )  # fmt: skip
        return output.keep_masks

    rows = [*kept([0]), *kept([1])]
    assert len(rows) == 2 and not torch.equal(*rows)
    for masks in (kept([0, 1]), kept([0, 1], whole=False)):
        assert all(map(torch.equal, masks, rows))


def test_labels_that_leave_no_question_get_a_sentence(pruned, one):
    rule = PruningConfig(keep_ratio=0.3, score="cdpruner")
    with pytest.raises(ValueError, match="labels cover all the text of a prompt with images. Give its question"):
        pruned(**one, labels=one["input_ids"].clone(), pruning=rule)


@torch.no_grad()
def test_layers_that_were_not_run_are_not_handed_out(family, pruned, one):
    """Counted from the end, they would be other layers than the stock model's."""
    asked = {"output_hidden_states": True, "return_dict": True}
    whole = pruned.get_image_features(**visual(one), **asked).hidden_states
    stock = pruned.get_image_features(**visual(one), **asked, pruning=PruningConfig(enabled=False)).hidden_states
    layer = pruned.config.vision_feature_layer
    for states in (whole, pruned.get_image_features(**visual(one), return_dict=True).get("hidden_states")):
        assert states is None or (len(states) == len(stock) and torch.equal(states[layer], stock[layer]))
    assert whole is not None
