"""Every measured quantity against a slow, literal transcription of the method: whole prompts, no cache, no batches."""

import math

import pytest
import torch
from transformers import AutoProcessor
from transformers.cache_utils import LinearAttentionLayer
from transformers.utils import logging

import tiny_checkpoint
from conftest import make_family
from transformers_rbl.building.measures import answer_confidence, answer_divergence, neighbourhoods
from transformers_rbl.building.probing import RECOMPUTED, Prober, article_tokens
from transformers_rbl.building.recipe import Recipe
from transformers_rbl.building.showing import base_pixels, show_base, split_prompt
from transformers_rbl.evaluation.evaluate import prompt_text
from transformers_rbl.models.seam import CACHE
from transformers_rbl.prompts import chat_prompt


ALL = {"by": "all"}


def divergence(a, b, kind, k=10):
    best = sorted(range(len(a)), key=lambda i: -a[i])[:k]
    p, q = [math.exp(a[i]) for i in best], [math.exp(b[i]) for i in best]
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    m = [(x + y) / 2 for x, y in zip(p, q)]
    if kind == "upstream":
        to_p = sum(z * (math.log(z) - math.log(x)) for z, x in zip(m, p)) / k
        to_q = sum(z * (math.log(z) - math.log(y)) for z, y in zip(m, q)) / k
        return (to_p + to_q) / 2
    return sum(x * math.log(x / z) + y * math.log(y / z) for x, y, z in zip(p, q, m)) / 2


class Literal:
    """One prompt, one full pass of the stock model on embeddings."""

    def __init__(self, family, recipe, articles):
        self.model, self.recipe, self.articles = family.stock(), recipe, articles
        self.embed = self.model.get_input_embeddings()
        self.prefix, self.suffix = split_prompt(family.processor, recipe.prompt)

    @torch.no_grad()
    def tokens(self, pixels):
        """The base image through the tower and projector by hand."""
        inner, config = self.model.model, self.model.config
        hidden = inner.vision_tower(pixels[None], output_hidden_states=True).hidden_states[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            return inner.multi_modal_projector(hidden[:, 1:])[0], hidden[0]
        return inner.multi_modal_projector(hidden)[0], None

    @torch.no_grad()
    def answer(self, visual):
        ids = [torch.tensor(ids) for ids in (self.prefix, self.suffix)]
        embeds = torch.cat([self.embed(ids[0]), torch.stack(visual), self.embed(ids[1])])[None]
        logits = self.model(inputs_embeds=embeds).logits[0, -1]
        if int(logits.argmax()) in self.articles:
            embeds = torch.cat([embeds, self.embed(logits.argmax())[None, None]], dim=1)
            logits = self.model(inputs_embeds=embeds).logits[0, -1]
        return logits.double().tolist()

    def without(self, tokens, gone):
        kind = self.recipe.replacement
        if kind == "remove":
            return [token for i, token in enumerate(tokens) if i not in gone]
        pad = self.recipe.pad_token_id or self.model.config.text_config.pad_token_id
        filler = self.embed(torch.tensor(pad)) if kind == "pad" else tokens.mean(dim=0)
        return [filler if i in gone else token for i, token in enumerate(tokens)]

    def around(self, position, side):
        row, column = divmod(position, side)
        top, left = min(max(row - 1, 0), side - 3), min(max(column - 1, 0), side - 3)
        return [r * side + c for r in range(top, top + 3) for c in range(left, left + 3)]

    def probe(self, pixels, positions):
        tokens, _ = self.tokens(pixels)
        side = math.isqrt(len(tokens))
        whole = self.answer(list(tokens))
        for position in positions:
            alone = self.answer([tokens[position]])
            best = sorted(alone, reverse=True)[: self.recipe.top_k_p1]
            p1 = math.exp(best[0]) / sum(math.exp(v) for v in best)
            around = self.around(position, side)
            patch = [tokens[i] for i in around]
            # The filler of the local experiment is the image's mean, not the neighbourhood's.
            if self.recipe.replacement == "remove":
                left = [tokens[i] for i in around if i != position]
            else:
                left = [self.without(tokens, {position})[i] for i in around]
            pairs = {
                "local": (self.answer(patch), self.answer(left)),
                "global": (whole, self.answer(self.without(tokens, set(around)))),
            }
            top = sorted(range(len(alone)), key=lambda i: -alone[i])[:3]
            yield (
                p1,
                {
                    name: {kind: divergence(*pair, kind) for kind in ("upstream", "jensen_shannon")}
                    for name, pair in pairs.items()
                },
                top,
            )


def prober(family, recipe, articles=(), budget=8192, **kwargs):
    return Prober(family.stock(**kwargs), recipe, articles, budget)


@torch.no_grad()
def shown(prober, family, pixels):
    return show_base(prober.model, *split_prompt(family.processor, prober.recipe.prompt), pixels)


def probed(family, prober, pixels):
    return prober.probe("photo", shown(prober, family, pixels))


@pytest.mark.parametrize(("replacement", "budget"), [("pad", 8192), ("pad", 1), ("mean", 200), ("remove", 200)])
def test_every_quantity_equals_the_transcription(family, replacement, budget):
    """All sixteen positions of a 4 x 4 grid: inner ones, borders and corners."""
    recipe = Recipe(prompt="Name it.", targets=ALL, replacement=replacement, pad_token_id=7)
    literal = Literal(family, recipe, articles=set())
    pixels = base_pixels(family.processor, family.images(2)[1])
    first = [int(max(range(261), key=lambda i: v[i])) for v in [literal.answer([literal.tokens(pixels)[0][5]])]]
    literal.articles = set(first)  # as if the likeliest answer to one token were an article
    probe = probed(family, prober(family, recipe, first, budget), pixels)
    assert torch.equal(probe.positions, torch.arange(16))
    torch.testing.assert_close(probe.tokens, literal.tokens(pixels)[0], atol=1e-5, rtol=1e-5)
    for row, (p1, divergences, words) in enumerate(literal.probe(pixels, range(16))):
        assert float(probe.p1[row]) == pytest.approx(p1, abs=2e-5)
        assert probe.words[row] == [str(word) for word in words]
        for name, measured in (("local", probe.local), ("global", probe.globally)):
            for kind, value in divergences[name].items():
                assert float(measured[kind][row]) == pytest.approx(value, abs=2e-6, rel=1e-3), (name, kind, row)


def test_articles_are_skipped_once(family):
    recipe = Recipe(prompt="Name it.", targets=ALL)
    pixels = base_pixels(family.processor, family.images(1)[0])
    plain, skipping = prober(family, recipe), prober(family, recipe, range(261))
    image = shown(plain, family, pixels)
    literal = Literal(family, recipe, articles=set(range(261)))
    expected = torch.tensor([literal.answer([token]) for token in image.tokens[:3]]).float()
    with torch.no_grad():
        logits = skipping.single_input(image, torch.arange(3))
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
    off = prober(family, Recipe(prompt="Name it.", targets=ALL, skip_articles=0), range(261))
    with torch.no_grad():
        unskipped = plain.single_input(image, torch.arange(3))
        assert torch.equal(off.single_input(image, torch.arange(3)), unskipped)
    assert not torch.allclose(logits, unskipped, atol=1e-2)


def test_targets_by_rank_of_cls_similarity(tmp_path):
    recipe = Recipe(targets={"by": "cls_rank", "ranks": [[1, 2], [9, 9], [16, 16]]})
    family = make_family("llava_next", tmp_path)
    pixels = base_pixels(family.processor, family.images(2)[1])
    _, hidden = Literal(family, recipe, set()).tokens(pixels)
    similarity = [float(torch.cosine_similarity(patch, hidden[0], dim=0)) for patch in hidden[1:]]
    order = sorted(range(16), key=lambda i: -similarity[i])
    probe = probed(family, prober(family, recipe), pixels)
    assert probe.positions.tolist() == sorted([order[0], order[1], order[8], order[15]])


def test_towers_without_cls_need_other_targets(tmp_path):
    family = make_family("llava_onevision", tmp_path)
    pixels = base_pixels(family.processor, family.images(1)[0])
    with pytest.raises(ValueError, match=r"\[cls\] token, and this tower has none"):
        probed(family, prober(family, Recipe(targets={"by": "cls_rank", "ranks": [[1, 4]]})), pixels)
    with pytest.raises(ValueError, match="probes position 99, but an image has 16 tokens"):
        probed(family, prober(family, Recipe(targets={"by": "positions", "positions": [99]})), pixels)
    strided = probed(family, prober(family, Recipe(targets={"by": "stride", "stride": 5})), pixels)
    assert strided.positions.tolist() == [0, 5, 10, 15]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_runs(family, dtype):
    recipe = Recipe(targets={"by": "stride", "stride": 4})
    pixels = base_pixels(family.processor, family.images(1)[0])
    probe = probed(family, prober(family, recipe, dtype=dtype), pixels)
    assert probe.tokens.dtype == dtype and probe.p1.dtype == torch.float32 and probe.p1.isfinite().all()


def test_memory_that_runs_out_halves_the_budget(family, caplog):
    recipe = Recipe(targets=ALL)
    pixels = base_pixels(family.processor, family.images(1)[0])
    expected = probed(family, prober(family, recipe), pixels)
    small = prober(family, recipe)

    def limited(module, args, kwargs):
        if len(kwargs["inputs_embeds"]) > 3:
            raise torch.OutOfMemoryError("out of memory")

    def broken(module, args):
        raise RuntimeError("broken")

    small.model.model.language_model.register_forward_pre_hook(limited, with_kwargs=True)
    logging.enable_propagation()
    probe = probed(family, small, pixels)
    logging.disable_propagation()
    torch.testing.assert_close(probe.p1, expected.p1, atol=1e-5, rtol=0)
    assert small.budget < 8192 and "max_tokens_per_batch" in caplog.text
    small.model.model.language_model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="broken"):
        probed(family, small, pixels)


def test_a_language_model_that_caches_something_else_cannot_be_probed(family):
    """A model that announces keys and values, and keeps a state in their place."""
    small = prober(family, Recipe(targets=ALL))

    def with_state(module, args, output):
        if output[CACHE] is not None:
            output[CACHE].layers[-1] = LinearAttentionLayer()

    small.model.model.language_model.register_forward_hook(with_state)
    with pytest.raises(ValueError, match="caches something else than keys and values"):
        probed(family, small, base_pixels(family.processor, family.images(1)[0]))


@pytest.mark.parametrize("template", [True, False])
def test_probing_asks_as_evaluation_does(family, template):
    """One function makes every chat prompt."""
    processor = AutoProcessor.from_pretrained(family.folder)
    if not template:
        processor.chat_template = None
    prefix, suffix = split_prompt(processor, "Name it.")
    text = prompt_text(processor, "Name it.", 1)
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    assert processor.tokenizer(text)["input_ids"] == [*prefix, image, *suffix] and suffix
    assert (text == f"{processor.image_token}\nName it.") is not template
    content = [{"type": "video"}, {"type": "text", "text": "And this?"}, {"type": "image"}]
    if not template and hasattr(processor, "video_token"):
        assert chat_prompt(processor, content) == f"{processor.video_token}\nAnd this?\n{processor.image_token}"
    with pytest.raises(ValueError, match="puts 2 image tokens"):
        split_prompt(processor, f"Name {processor.image_token} it.")


def test_what_two_inputs_share_is_computed_once(family):
    """The vision tower once an image; of the whole image's prompt, tokens before the first changed one once."""
    recipe = Recipe(prompt="Name it.", targets=ALL)
    prober_ = prober(family, recipe, budget=1)
    counts = {"tower": 0, "tokens": 0}

    def tower(module, args, kwargs):
        counts["tower"] += 1

    def language(module, args, kwargs):
        counts["tokens"] += kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1]

    headless = prober_.model.model
    hooks = [
        headless.vision_tower.register_forward_pre_hook(tower, with_kwargs=True),
        headless.language_model.register_forward_pre_hook(language, with_kwargs=True),
    ]
    probed(family, prober_, base_pixels(family.processor, family.images(1)[0]))
    for hook in hooks:
        hook.remove()
    prefix, suffix = map(len, split_prompt(family.processor, "Name it."))
    starts = neighbourhoods(torch.arange(16), 4).amin(1)
    expected = prefix + 16 * (1 + suffix) + 2 * 16 * (9 + suffix) + 16 + suffix + int((16 - starts + suffix).sum())
    assert counts == {"tower": 1, "tokens": expected}


def test_batching_recomputes_little(family):
    """Rows that share a forward pass start at the earliest one's first changed token."""
    prober_ = prober(family, Recipe(prompt="Name it.", targets=ALL))
    image = shown(prober_, family, base_pixels(family.processor, family.images(1)[0]))
    around, lengths = neighbourhoods(torch.arange(16), 4), []
    hook = prober_.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    with torch.no_grad():
        prober_.global_leave_one_out(image, around)
    hook.remove()
    suffix = len(split_prompt(family.processor, "Name it.")[1])
    batches = lengths[3:]  # after the prompt's beginning, the whole image's tokens and its answer
    needed = int((16 - around.amin(1) + suffix).sum())
    assert sum(rows for rows, _ in batches) == 16 and 1 < len(batches) < 16
    assert needed < sum(rows * length for rows, length in batches) <= needed * (1 + RECOMPUTED)


def test_measures_on_known_logits():
    a, b = torch.tensor([[2.0, 1.0, 0.0, -3.0]]), torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    for kind in ("upstream", "jensen_shannon"):
        value = answer_divergence(a, b, top_k=3, kind=kind)
        assert float(value) == pytest.approx(divergence(a[0].tolist(), b[0].tolist(), kind, 3), rel=1e-5)
        assert float(answer_divergence(a, a, 3, kind)) == pytest.approx(0, abs=1e-9)
    assert float(answer_confidence(a, 2)) == pytest.approx(math.exp(2) / (math.exp(2) + math.exp(1)), rel=1e-6)
    assert float(answer_confidence(a, 50)) == pytest.approx(float(a.softmax(-1).max()), rel=1e-6)
    assert answer_divergence(a * 1e4, b * 1e4).isfinite().all()
    with pytest.raises(ValueError, match="kind must be"):
        answer_divergence(a, b, kind="kl")


def test_neighbourhoods_are_shifted_inwards():
    around = neighbourhoods(torch.tensor([0, 5, 15, 3]), 4)
    corner, middle = [0, 1, 2, 4, 5, 6, 8, 9, 10], [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert around[0].tolist() == corner and around[1].tolist() == middle
    assert around[2].tolist() == [5, 6, 7, 9, 10, 11, 13, 14, 15]
    assert around[3].tolist() == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    wide = neighbourhoods(torch.tensor([0, 9]), (2, 5))  # two rows of five
    assert wide.tolist() == [[0, 1, 2, 5, 6, 7], [2, 3, 4, 7, 8, 9]]
    assert neighbourhoods(torch.tensor([4]), (5, 1)).tolist() == [[2, 3, 4]]
    assert neighbourhoods(torch.arange(4), 2).tolist() == [[0, 1, 2, 3]] * 4


def test_articles_of_a_vocabulary():
    class Tokenizer:
        def get_vocab(self):
            return {"▁A": 5, "Ġthe": 3, "an": 9, "ant": 1, "▁": 2, "THE": 4}

    assert article_tokens(Tokenizer()) == [3, 4, 5, 9]
    assert tiny_checkpoint.tokenizer().convert_tokens_to_ids("a") in article_tokens(tiny_checkpoint.tokenizer())
