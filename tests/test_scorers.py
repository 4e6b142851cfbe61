"""Every scorer through one matrix; a scorer is one function and one line in `SCORERS`."""

import functools
import itertools
import json
import pickle

import pytest
import torch

from conftest import GREEDY, make_family, visual
from transformers_rbl import PruningConfig, RedundancyCodebook, kept_token_count, register_scorer
from transformers_rbl.models.codebook import choose, keep_mask
from transformers_rbl.models.greedy import over_images
from transformers_rbl.models.layout import NEWLINE
from transformers_rbl.models.merging import Choice
from transformers_rbl.models.pruning import select_tokens
from transformers_rbl.models.scorers import MERGING, SCORERS, chooses, score_tokens


ALL = sorted(SCORERS)
RANKED = [name for name in ALL if not chooses(name)]
WITHOUT_CODEBOOK = [name for name in ALL if not PruningConfig(keep_ratio=0.5, score=name).needs_codebook]


@pytest.fixture
def given():
    """What a scorer may ask for, of 40 tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(40, 12, generator=generator)
    book = RedundancyCodebook(torch.randn(6, 12, generator=generator))
    similarity = torch.rand(40, generator=generator)
    attention, keys = torch.rand(40, generator=generator).softmax(0), torch.randn(40, 2, 5, generator=generator)
    question = torch.randn(7, 12, generator=generator)
    own = {"cls_similarity": similarity, "cls_attention": attention, "tower_keys": keys, "question": question}
    return {"tokens": tokens, "codebook": book, **own}


def scores(name, given, **changes):
    given = {**given, **changes}
    prototypes = given["codebook"].unit_prototypes
    rest = {"seed": 0, "frame": 0, **{key: value for key, value in given.items() if key != "codebook"}}
    return score_tokens(name, unit_prototypes=prototypes, **rest)


def mask(name, given, **changes):
    given = {**given, **changes}
    settings = PruningConfig(keep_ratio=given.pop("keep_ratio", 0.3), score=name, seed=given.pop("seed", 0))
    return keep_mask(given.pop("tokens"), settings, **given)


def of_length(count, given):
    """The first tokens alone, with what belongs to them."""
    return {name: given[name][:count] for name in ("tokens", "cls_similarity", "cls_attention", "tower_keys")}


@pytest.mark.parametrize("name", ALL)
class TestEveryScorer:
    @pytest.mark.parametrize("ratio", [0.01, 0.11, 0.5, 0.975, 1.0])
    def test_a_ratio_keeps_exactly_that_many(self, name, given, ratio):
        kept = mask(name, given, keep_ratio=ratio)
        assert kept.dtype == torch.bool and kept.sum() == kept_token_count(40, ratio)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_the_same_call_keeps_the_same_and_autocast_changes_nothing(self, name, given, dtype):
        tokens = given["tokens"].to(dtype)
        first = mask(name, given, tokens=tokens)
        assert torch.equal(first, mask(name, given, tokens=tokens.float()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(first, mask(name, given, tokens=tokens))

    def test_the_order_and_length_of_prototypes_and_tokens_change_nothing(self, name, given):
        kept = mask(name, given)
        shuffled = RedundancyCodebook(given["codebook"].prototypes[[3, 0, 5, 1, 4, 2]] * 64)
        assert torch.equal(mask(name, given, codebook=shuffled, tokens=given["tokens"] * 128), kept)

    def test_no_tokens_and_one_token(self, name, given):
        assert mask(name, given, **of_length(0, given)).shape == (0,)
        assert mask(name, given, **of_length(1, given)).tolist() == [True]

    def test_what_it_needs_is_named(self, name):
        with pytest.raises(ValueError, match=f"score='{name}' needs"):
            score_tokens(name)


@pytest.mark.parametrize("name", RANKED)
class TestEveryScorerThatRanks:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_one_float32_score_a_token(self, name, given, dtype):
        result = scores(name, given, tokens=given["tokens"].to(dtype))
        assert result.shape == (40,) and result.dtype == torch.float32 and not result.isnan().any()

    def test_the_same_call_gives_the_same_scores_and_autocast_changes_nothing(self, name, given):
        first = scores(name, given)
        assert torch.equal(first, scores(name, given))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(first, scores(name, given))

    @pytest.mark.parametrize("ratio", [0.01, 0.11, 0.5, 0.975, 1.0])
    def test_a_ratio_keeps_the_lowest(self, name, given, ratio):
        kept = mask(name, given, keep_ratio=ratio)
        result = scores(name, given)
        assert kept.all() or result[kept].max() <= result[~kept].min()

    def test_a_threshold_cuts_the_same_ranking(self, name, given):
        result = scores(name, given)
        cut = float(result.sort().values[12])
        kept = keep_mask(pruning=PruningConfig(threshold=cut, score=name), **given)
        assert torch.equal(kept, result < cut) and kept.sum() == 12

    def test_fewer_tokens_are_a_subset_of_more(self, name, given):
        few, many = mask(name, given, keep_ratio=0.2), mask(name, given, keep_ratio=0.6)
        assert (few <= many).all()

    def test_the_order_of_prototypes_changes_nothing(self, name, given):
        shuffled = RedundancyCodebook(given["codebook"].prototypes[[3, 0, 5, 1, 4, 2]])
        torch.testing.assert_close(scores(name, given, codebook=shuffled), scores(name, given))
        assert torch.equal(mask(name, given, codebook=shuffled), mask(name, given))

    def test_length_of_tokens_and_prototypes_changes_nothing(self, name, given):
        longer = RedundancyCodebook(given["codebook"].prototypes * 64)
        changed = scores(name, given, codebook=longer, tokens=given["tokens"] * 128)
        torch.testing.assert_close(changed, scores(name, given))

    def test_equal_tokens_tie_and_the_earlier_stays(self, name, given):
        same = {key: value[:1].expand(8, *value.shape[1:]) for key, value in of_length(1, given).items()}
        if name != "random":
            assert mask(name, given, **same, keep_ratio=0.5).tolist() == [True] * 4 + [False] * 4


def test_softmax_scores_are_the_formulas(given):
    unit = torch.nn.functional.normalize(given["tokens"], dim=-1)
    c = (unit @ given["codebook"].unit_prototypes.T).exp()
    single, double = c / c.sum(1, keepdim=True), c / c.sum(0, keepdim=True)
    torch.testing.assert_close(scores("softmax", given), single.amax(1))
    torch.testing.assert_close(scores("double_softmax", given), (single * double).amax(1))


def test_random_is_reproducible_by_seed_and_frame(given):
    drawn = [scores("random", given, seed=seed, frame=frame) for seed, frame in ((0, 0), (1, 0), (0, 1))]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(drawn))
    state = torch.random.get_rng_state()
    scores("random", given)
    assert torch.equal(state, torch.random.get_rng_state())  # the user's own draws are left alone


def test_cls_similarity_keeps_either_end(given):
    low, high = mask("cls_similarity_low", given), mask("cls_similarity_high", given)
    order = given["cls_similarity"].argsort()
    assert set(low.nonzero()[:, 0].tolist()) == set(order[:12].tolist())
    assert set(high.nonzero()[:, 0].tolist()) == set(order[-12:].tolist())


def test_diversity_is_the_greedy_max_min_rule(given):
    unit = torch.nn.functional.normalize(given["tokens"], dim=-1)
    distance = 1 - unit @ unit.T
    away = [min(float(distance[i, j]) for j in range(40) if j != i) for i in range(40)]
    chosen = [max(range(40), key=lambda i: away[i])]
    while len(chosen) < 12:
        rest = [i for i in range(40) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in chosen)))
    assert set(mask("diversity", given).nonzero()[:, 0].tolist()) == set(chosen)
    every = scores("diversity", given)
    assert every[chosen].tolist() == sorted(every[chosen].tolist()) and every.isfinite().all()


def longest_first(tokens):
    """A rule of the user's: keeps long tokens."""
    return -tokens.norm(dim=-1)


def every_other(tokens, count) -> Choice:
    """A rule of the user's that does not rank: the first of every run of equal length."""
    kept = torch.zeros(len(tokens), dtype=torch.bool)
    kept[torch.arange(count) * len(tokens) // count] = True
    return Choice(kept)


def too_many(tokens):
    return Choice(torch.ones(len(tokens), dtype=torch.bool))


def one_number(tokens):
    return tokens.sum()


def of_colours(tokens, colour, size):
    return tokens


def by_place(count, frame):
    return torch.tensor([0.0, 1.0]).repeat(8)


def cut(tokens, number):
    return tokens[:, number]


@over_images
def framed(tokens, frame):
    return tokens[..., 0] + frame


@over_images
def several_choices(tokens, count) -> Choice:
    return Choice(torch.ones(tokens.shape[:2], dtype=torch.bool))


@over_images
def unannotated(tokens):
    return Choice(torch.ones(tokens.shape[:2], dtype=torch.bool))


def with_defaults(tokens, count=None, seed=5):
    return torch.arange(len(tokens)).roll(count + seed).float()


def writes(tokens, unit_prototypes):
    return unit_prototypes.zero_().sum() + tokens.zero_()[:, 0]


SAID = {}


def says(tokens, count):
    return SAID["what"](len(tokens), count)


def says_a_choice(tokens, count) -> Choice:
    return Choice(*SAID["what"](len(tokens), count))


def first(length, count):
    return torch.arange(length) < count


@pytest.fixture
def register():
    """`register_scorer`, undone afterwards."""
    before = dict(SCORERS)
    yield register_scorer
    SCORERS.clear()
    SCORERS.update(before)


def test_a_rule_of_the_users_prunes_a_model_that_is_saved_with_it(given, register, family, one, tmp_path):
    register("longest", longest_first)
    kept = mask("longest", given)
    assert torch.equal(kept, select_tokens(-given["tokens"].norm(dim=-1), PruningConfig(keep_ratio=0.3)))
    settings = PruningConfig(keep_ratio=0.3, score="longest")
    model = family.rbl_class.from_pretrained(family.folder, pruning=settings).eval()
    output = model(**one)
    assert not output.prompt_mask.all()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruning"]["score_from"] == "test_scorers:longest_first"
    again = family.rbl_class.from_pretrained(tmp_path).eval()
    assert again.pruning == settings and torch.equal(again(**one).logits, output.logits)
    with pytest.raises(ValueError, match=r"score='longest' is yours \(test_scorers:longest_first\)"):
        model.save_pretrained(tmp_path / "code", with_code=True)
    del SCORERS["longest"]
    with pytest.raises(ValueError, match=r"import test_scorers, or call register_scorer\('longest', …\)") as error:
        family.rbl_class.from_pretrained(tmp_path)
    assert str(error.value).endswith("before loading. Or give pruning= here.")  # an upgrade would not help
    assert family.rbl_class.from_pretrained(tmp_path, pruning=PruningConfig(enabled=False)).codebook is None


def test_a_rule_of_the_users_may_choose(given, register):
    register("every_other", every_other)
    assert mask("every_other", given, keep_ratio=0.5).tolist() == [True, False] * 20
    with pytest.raises(ValueError, match="'every_other' chooses a number of tokens and has no threshold"):
        PruningConfig(threshold=0.5, score="every_other")
    register("too_many", too_many)
    with pytest.raises(ValueError, match="keeps 40 of 40 tokens where 12 are to stay"):
        mask("too_many", given)
    register("one_number", one_number)
    with pytest.raises(ValueError, match=r"shape \(\) for 40 tokens"):
        mask("one_number", given)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda length, count: [0.0] * length, "gave a list"),
        (lambda length, count: None, "gave a NoneType"),
        (lambda length, count: torch.arange(length), "gave a tensor of torch.int64"),
        (lambda length, count: torch.zeros(length, device="meta"), "gave a tensor on meta"),
        (
            lambda length, count: torch.zeros(length, 1),
            r"gave a tensor of shape \(40, 1\) for 40 tokens: a score a token",
        ),
    ],
)
def test_what_is_no_score_a_token_is_refused(given, register, what, words):
    register("says", says)
    SAID["what"] = what
    with pytest.raises(ValueError, match=f"score='says' {words}"):
        mask("says", given)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            lambda n, count: [torch.arange(n + 5) >= n + 5 - count],
            r"\(45,\) for 40 tokens: Choice.kept of shape \(40,\)",
        ),
        (
            lambda n, count: [first(n, count).long()],
            "tensor of torch.int64 for 40 tokens: Choice.kept .*, bool, on cpu",
        ),
        (lambda n, count: [first(n, count).tolist()], "gave a list"),
        (lambda n, count: [first(n, count - 1)], "keeps 11 of 40 tokens where 12 are to stay"),
        (lambda n, count: [first(n, count), torch.eye(n)], r"Choice.weights of shape \(12, 40\), float"),
        (lambda n, count: [first(n, count), torch.eye(n)[:count].long()], "a tensor of torch.int64"),
    ],
)
def test_what_is_no_choice_is_refused(given, register, what, words):
    register("says_a_choice", says_a_choice)
    SAID["what"] = what
    with pytest.raises(ValueError, match=words):
        mask("says_a_choice", given)


def test_a_choice_may_come_in_half_precision_and_must_be_announced(given, register):
    register("says_a_choice", says_a_choice)
    SAID["what"] = lambda n, count: [first(n, count), torch.eye(n)[:count].bfloat16() / 2]
    rule = PruningConfig(keep_ratio=0.3, score="says_a_choice")
    [choice] = choose([{"tokens": given["tokens"]}], rule)
    torch.testing.assert_close(choice.merged(given["tokens"])[:12], given["tokens"][:12] / 2)
    register("too_many", too_many)
    with pytest.raises(ValueError, match="returns a Choice: annotate it so"):
        keep_mask(given["tokens"], PruningConfig(threshold=0.5, score="too_many"))
    register("unannotated", unannotated)
    for images in (1, 2):
        with pytest.raises(ValueError, match=r"returns scores \(images, L\); got Choice"):
            choose([{"tokens": given["tokens"]}] * images, PruningConfig(keep_ratio=0.3, score="unannotated"))


def test_arguments_with_defaults_are_supplied_too(given, register):
    register("with_defaults", with_defaults)
    kept = mask("with_defaults", given, seed=2)
    assert kept.nonzero()[:, 0].tolist() == list(range(14, 26))  # not from 5 on, nor without a count


def test_a_rule_that_writes_on_what_it_is_given_changes_nothing_of_the_callers(given, register):
    register("writes", writes)
    before = given["tokens"].clone(), given["codebook"].unit_prototypes.clone()
    mask("writes", given)
    assert torch.equal(given["tokens"], before[0]) and torch.equal(given["codebook"].unit_prototypes, before[1])


def test_settings_that_were_pickled_where_the_rule_was_registered_get_a_sentence(pruned, one, register):
    register("longest", longest_first)
    pickled = pickle.dumps(PruningConfig(keep_ratio=0.3, score="longest"))
    del SCORERS["longest"]
    with pytest.raises(ValueError, match="got 'longest'. A rule of your own is registered in every process"):
        pruned(**one, pruning=pickle.loads(pickled))


def test_another_rule_under_the_name_is_not_loaded(register):
    register("longest", longest_first)
    saved = PruningConfig(keep_ratio=0.3, score="longest").to_dict()
    assert PruningConfig.from_dict(saved).score == "longest"
    del SCORERS["longest"]
    register("longest", one_number)
    with pytest.raises(ValueError, match="was test_scorers:longest_first .* and is test_scorers:one_number here"):
        PruningConfig.from_dict(saved)


@pytest.mark.parametrize("name", sorted(MERGING))
def test_keeping_all_is_the_stock_model_by_rules_that_merge_too(given, name):
    image = {key: value for key, value in given.items() if key != "codebook"}
    [choice] = choose([image], PruningConfig(keep_ratio=1.0, score=name))
    assert choice.kept.all() and torch.equal(choice.merged(given["tokens"]), given["tokens"])


def test_names_that_clash_and_needs_that_nothing_meets_are_refused(register):
    with pytest.raises(ValueError, match="score must be one of"):
        PruningConfig(keep_ratio=0.3, score="longest")
    for name, function, error, words in (
        ("cosine", longest_first, ValueError, "a rule of this library"),
        ("longest first", longest_first, ValueError, "letters, digits and underscores"),
        ("longest", "norm", TypeError, "is a str"),
        ("longest", of_colours, ValueError, "asks for colour, size; what a scorer can be"),
        ("longest", lambda tokens: tokens, ValueError, "<lambda>, which saved settings could not tell from another"),
        ("longest", functools.partial(cut, number=1), ValueError, "<a partial>, which saved settings could not tell"),
        ("longest", framed, ValueError, "takes several images at once: it has no frame"),
        ("longest", several_choices, ValueError, "takes several images at once: .* returns scores"),
    ):
        with pytest.raises(error, match=words):
            register(name, function)
    register("longest", longest_first)
    register("longest", longest_first)  # a module that is loaded again
    with pytest.raises(ValueError, match="registered already, as test_scorers:longest_first"):
        register("longest", every_other)


@pytest.mark.parametrize("name", ALL)
def test_models_prune_by_every_scorer(family, pruned, batch, name):
    """Kept counts are exact, a batch equals single, and what comes out is what stayed."""
    settings = PruningConfig(keep_ratio=0.3, score=name)
    if name.startswith("cls_similarity") and family.name == "llava_onevision":
        with pytest.raises(ValueError, match=r"\[cls\] token.*siglip"):
            pruned(**batch, pruning=settings)
        return
    output = pruned(**batch, pruning=settings)
    kinds = pruned.model.token_kinds(**batch)
    for kept, kind in zip(output.keep_masks, kinds, strict=True):
        assert (
            kept[kind != NEWLINE].sum() == kept_token_count(int((kind != NEWLINE).sum()), 0.3)
            and kept[kind == NEWLINE].all()
        )
    alone = family.inputs(["<s>USER: <image>\nHow many? ASSISTANT:"], family.images(2)[1:])
    single = pruned(**alone, pruning=settings)
    assert torch.equal(single.keep_masks[0], output.keep_masks[1])
    sequences = pruned.generate(**batch, **GREEDY, pruning=settings)
    assert sequences.shape[1] > batch.input_ids.shape[1]


@pytest.mark.parametrize("name", WITHOUT_CODEBOOK)
def test_baselines_need_no_codebook(family, one, name):
    settings = PruningConfig(keep_ratio=0.3, score=name)
    model = family.rbl_class.from_pretrained(family.folder, pruning=settings).eval()
    if name.startswith("cls_similarity") and family.name == "llava_onevision":
        return
    assert not model(**one).prompt_mask.all() and model.codebook is None
    with pytest.raises(ValueError, match="no codebook"):
        model(**one, pruning=PruningConfig(keep_ratio=0.3))


@pytest.mark.parametrize("tiles", ["all", "base"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_cls_similarity_is_that_of_the_selected_hidden_layer(tmp_path, name, tiles):
    """Any family with a CLIP tower; tiles are scored against their own [cls]."""
    family = make_family(name, tmp_path, tower="clip")
    model, stock = family.pruned(), family.stock()
    inputs = family.inputs(["<s> <image>"], family.images(2)[1:])
    settings = PruningConfig(keep_ratio=0.25, score="cls_similarity_high", tiles=tiles)
    kept = model(**inputs, pruning=settings).keep_masks[0]
    pixels = inputs.pixel_values[0] if inputs.pixel_values.ndim == 5 else inputs.pixel_values
    hidden = stock.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
    rows = [torch.cosine_similarity(tile[1:], tile[:1], dim=-1) for tile in hidden]
    base = kept[:16].nonzero()[:, 0].tolist()
    if name == "llava" or tiles == "base":
        assert set(base) == set(rows[0].topk(4).indices.tolist())
        return
    values = model.model.family.pack(model.model, [torch.stack(rows)[..., None]], torch.full((1,), torch.nan), inputs)[
        0
    ][:, 0]
    scored = ~values.isnan()
    cut = values[scored].sort().values[-int(kept[scored].sum())]
    assert torch.equal(kept[scored], values[scored] >= cut)


def test_cls_similarity_of_video_frames(tmp_path):
    import numpy as np

    family = make_family("llava_onevision", tmp_path, tower="clip")
    model = family.pruned()
    clip = np.random.RandomState(0).randint(0, 255, (3, 30, 30, 3), dtype=np.uint8)
    inputs = family.inputs(["<s> <video>"], videos=[clip])
    settings = PruningConfig(keep_ratio=0.25, score="cls_similarity_low")
    kept = model(**inputs, pruning=settings).video_keep_masks[0]
    hidden = model.model.vision_tower(inputs.pixel_values_videos[0], output_hidden_states=True).hidden_states[-2]
    for frame, part in zip(hidden, kept[:-1].view(3, 4)):
        grid = torch.cosine_similarity(frame[1:], frame[:1], dim=-1).view(2, 2, 2, 2).mean(dim=(1, 3))  # 2 x 2 pooling
        assert part.nonzero()[:, 0].tolist() == [int(grid.flatten().argmin())]
    assert visual(inputs).keys() == {"pixel_values_videos"}


def test_a_scorer_of_the_users_may_read_no_tensor(register):
    """A rule by position alone: every other token."""
    register("every_other", by_place)
    mask = keep_mask(torch.randn(16, 32), PruningConfig(keep_ratio=0.5, score="every_other"))
    assert mask.tolist() == [True, False] * 8


def test_zero_images_get_a_sentence(family, pruned):
    with pytest.raises(ValueError, match="holds no image: leave it out"):
        pruned.get_image_features(
            pixel_values=torch.zeros(0, 3, 28, 28), image_sizes=torch.zeros(0, 2, dtype=torch.long)
        )
