"""`rbl verify`: a sound model passes every contract, and each contract notices what breaks it."""

import functools
import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from typer.testing import CliRunner

from conftest import make_family
from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.cli import app
from transformers_rbl.demo import loading
from transformers_rbl.models.merging import Choice
from transformers_rbl.models.scorers import SCORERS, max_cosine
from transformers_rbl.models.seam import CACHE_NAMES
from transformers_rbl.verify import (
    ALL,
    CONTRACTS,
    FAILED,
    LOADS,
    MEASURED,
    OFF,
    PASSED,
    SKIPPED,
    Broken,
    Decoded,
    Subject,
    drawn_picture,
    stock_twin,
    verify,
    verify_checkpoint,
)


OFF_IS_STOCK = "Pruning off is the stock class"
KEEP_ALL = "Keeping all is the stock class"
SEES_KEPT = "The language model sees kept tokens alone"
MOST_REDUNDANT = "The most redundant tokens are dropped"
ORACLE = "The answer is that of kept tokens by hand"
BATCH = "A batch is its prompts one by one"
TURNS = {name: f"A second turn on {name}= is starting over" for name in CACHE_NAMES}
STATIC = "A static cache gives the same answer"
SCORES = "Scores are float32"
HALF, FEWER = PruningConfig(keep_ratio=0.5), PruningConfig(keep_ratio=0.1)


def rbl(*words):
    return CliRunner().invoke(app, ["verify", *map(str, words), "--device", "cpu"])


def results(checks):
    return {check.name: check.result for check in checks}


def failed(checks):
    return {check.name for check in checks if check.result == FAILED}


@pytest.fixture(scope="module")
def next_family(tmp_path_factory):
    return make_family("llava_next", tmp_path_factory.mktemp("next"))


def test_a_stock_checkpoint_passes(family):
    result = rbl(family.folder, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert [check["name"] for check in report["checks"]] == list(CONTRACTS)
    assert [check["result"] for check in report["checks"]] == [PASSED] * (len(CONTRACTS) - 1) + [MEASURED]
    assert report["settings"]["codebook"] == "8 random visual tokens of the picture"
    assert {"transformers_rbl", "transformers", "torch", "tokenizers", "huggingface_hub", "python", "platform"} < set(
        report["versions"]
    )
    assert (report["versions"]["device"], report["versions"]["dtype"]) == ("cpu", "float32")


def test_a_pruned_checkpoint_passes_in_words(family, tmp_path):
    family.pruned(full_length_logits=True).save_pretrained(tmp_path)
    family.processor.save_pretrained(tmp_path)
    family.images(2)[1].save(tmp_path / "picture.png")
    result = rbl(tmp_path, "--image", tmp_path / "picture.png", "--keep-ratio", 0.4)
    assert result.exit_code == 0, result.output
    assert "codebook the checkpoint's own, picture " in result.stdout and "keep_ratio 0.4" in result.stdout
    assert all(name in result.stdout for name in CONTRACTS) and "transformers_rbl 0." in result.stdout
    assert result.stdout.count(PASSED) == len(CONTRACTS) - 1 and "(medians of " in result.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes(family, tmp_path, dtype):
    family.codebook.save_pretrained(tmp_path)
    report = verify_checkpoint(family.folder, codebook=tmp_path, device="cpu", dtype=dtype)
    assert report.passed and report.versions["dtype"] == dtype, report
    assert report.settings["codebook"] == str(tmp_path)


@pytest.mark.parametrize(
    ("score", "merge", "skipped"),
    [
        ("codebook_dpp", "none", {MOST_REDUNDANT}),
        ("cosine", "nearest", set()),
        ("visionzip", "nearest", {MOST_REDUNDANT}),
        ("tome", "none", {MOST_REDUNDANT, ORACLE, "Prefill"}),
        ("cdpruner", "none", {MOST_REDUNDANT, *TURNS.values()}),
    ],
)
def test_every_rule_passes_what_holds_for_it(next_family, score, merge, skipped):
    checks = verify(next_family.pruned(), next_family.processor, loading_info={}, score=score, merge=merge)
    assert not failed(checks), checks
    assert {check.name for check in checks if check.result == SKIPPED} == skipped


def test_kept_positions_pass_and_closed_ones_in_their_place_are_noticed(next_family, monkeypatch):
    model, settings = next_family.pruned(), {"loading_info": {}, "keep_positions": True}
    assert not failed(verify(model, next_family.processor, **settings))

    def as_if_the_model_counted(plan, positions):
        return None

    monkeypatch.setattr("transformers_rbl.models.modeling_rbl.compact_positions", as_if_the_model_counted)
    assert ORACLE in failed(verify(model, next_family.processor, **settings))


def test_a_rule_that_the_model_cannot_prune_by_is_refused(tmp_path):
    family = make_family("llava_onevision", tmp_path)
    result = rbl(family.folder, "--score", "cls_similarity_low")
    assert result.exit_code != 0 and "need a vision tower with a [cls] token" in " ".join(result.output.split())
    assert "score must be one of" in " ".join(rbl(family.folder, "--score", "lucky").output.split())


def test_merging_that_is_not_the_means_of_the_nearest_is_noticed(next_family, monkeypatch):
    model, merged = next_family.pruned(), Choice.merged
    monkeypatch.setattr(Choice, "merged", lambda choice, tokens: merged(choice, tokens) * 1.01)
    assert ORACLE in failed(verify(model, next_family.processor, merge="nearest"))


def test_without_a_model_it_checks_the_committed_one():
    result = rbl()
    assert result.exit_code == 0 and "digits-llava-next, codebook the checkpoint's own" in result.stdout


def changing(monkeypatch, owner, name, change):
    """`change(original, *args, **kwargs)` in place of a method, with its signature."""
    original = getattr(owner, name)
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(*args, **kwargs):
        return change(original, *args, **kwargs)

    method.__signature__ = signature
    monkeypatch.setattr(owner, name, method)


def instead(before, after):
    """Settings `before` silently become `after`."""

    def change(original, *args, pruning=None, **kwargs):
        return original(*args, pruning=after if pruning == before else pruning, **kwargs)

    return change


def off_by_a_little(original, *args, pruning=None, **kwargs):
    output = original(*args, pruning=pruning, **kwargs)
    if pruning == OFF:
        output.logits = output.logits + 1e-6
    return output


def a_gap_in_positions(original, self, *args, **kwargs):
    """The token after an image stands one too far."""
    if kwargs.get("pixel_values") is not None and kwargs["pruning"] not in (OFF, ALL):
        ids = kwargs["input_ids"]
        after = (ids == self.config.image_token_id).flip(1).cumsum(1).flip(1) == 0
        kwargs["position_ids"] = torch.arange(ids.shape[1])[None] + after.long()
    return original(self, *args, **kwargs)


def attend_to_padding(original, *args, **kwargs):
    kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
    return original(*args, **kwargs)


def without_cache(name):
    def change(original, *args, **kwargs):
        kwargs.pop(name, None)
        return original(*args, **kwargs)

    return change


def forward_without_cache(name):
    def change(original, self, *args, **kwargs):
        if kwargs.get("pruning") is not None and kwargs.pop(name, None) is not None:  # not a step of generate
            kwargs["attention_mask"] = None
        return original(self, *args, **kwargs)

    return change


def fewer_in_a_static_cache(original, *args, pruning=None, **kwargs):
    return original(*args, pruning=FEWER if "cache_implementation" in kwargs else pruning, **kwargs)


def another_order(original, *args, **kwargs):
    return -original(*args, **kwargs)


def rounded(original, *args, **kwargs):
    return original(*args, **kwargs).bfloat16()


RULE = PruningConfig(keep_ratio=0.2)
BREAKAGES = {
    "off is not": (["forward"], off_by_a_little, {OFF_IS_STOCK}),
    "off prunes in generate": (["generate"], instead(OFF, HALF), {OFF_IS_STOCK}),
    "keep-all drops": (["forward"], instead(ALL, HALF), {KEEP_ALL}),
    "keep-all drops in generate": (["generate"], instead(ALL, HALF), {KEEP_ALL}),
    "too many stay": (["forward", "generate"], instead(RULE, HALF), {SEES_KEPT}),
    "nothing is dropped": (["forward"], instead(RULE, ALL), {SEES_KEPT, ORACLE}),
    "positions": (["forward"], a_gap_in_positions, {ORACLE}),
    "padding": (["generate"], attend_to_padding, {BATCH}),
    "static cache": (["generate"], fewer_in_a_static_cache, {STATIC}),
    **{f"generate, {name}": (["generate"], without_cache(name), {TURNS[name]}) for name in CACHE_NAMES},
    **{f"forward, {name}": (["forward"], forward_without_cache(name), {TURNS[name]}) for name in CACHE_NAMES},
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_model_fails_in_the_right_line(next_family, monkeypatch, breakage):
    names, change, expected = BREAKAGES[breakage]
    for name in names:
        changing(monkeypatch, next_family.rbl_class, name, change)
    result = rbl(next_family.folder, "--json")
    report = json.loads(result.stdout)
    broken = {check["name"]: check["figure"] for check in report["checks"] if check["result"] == FAILED}
    assert set(broken) == expected, broken
    assert result.exit_code == 1 and report["passed"] is False


@pytest.mark.parametrize(
    ("change", "expected"), [(another_order, {MOST_REDUNDANT, SCORES}), (rounded, {SCORES})], ids=["order", "dtype"]
)
def test_broken_scores_fail(next_family, monkeypatch, change, expected):
    """Broken where pruning and the codebook's own `score` ask alike."""
    monkeypatch.setitem(SCORERS, "cosine", functools.wraps(max_cosine)(functools.partial(change, max_cosine)))
    checks = verify_checkpoint(next_family.folder, device="cpu").checks
    assert expected <= failed(checks) <= {MOST_REDUNDANT, SCORES}


def test_keep_masks_that_are_not_what_was_kept_fail(next_family, monkeypatch):
    def change(original, *args, **kwargs):
        output = original(*args, **kwargs)
        if kwargs.get("pruning") == RULE and "keep_masks" in output:
            output.keep_masks = [mask.roll(1) for mask in output.keep_masks]
        return output

    changing(monkeypatch, next_family.rbl_class, "forward", change)
    assert {SEES_KEPT, MOST_REDUNDANT, ORACLE} <= failed(verify_checkpoint(next_family.folder, device="cpu").checks)


def test_a_check_that_raises_fails_and_the_others_go_on(next_family, monkeypatch):
    def change(original, *args, **kwargs):
        if "cache_implementation" in kwargs:
            raise RuntimeError("no [static] kernel\nand more")
        return original(*args, **kwargs)

    changing(monkeypatch, next_family.rbl_class, "generate", change)
    result = rbl(next_family.folder)
    assert result.exit_code == 1 and "RuntimeError: no [static] kernel" in result.stdout
    assert "and more" not in result.stdout and result.stdout.count(PASSED) == len(CONTRACTS) - 2

    changing(monkeypatch, next_family.stock_class, "generate", change)
    checks = verify_checkpoint(next_family.folder, device="cpu").checks
    assert results(checks)[STATIC] == SKIPPED and not failed(checks)


def test_a_missing_weight_fails(next_family, tmp_path):
    folder = shutil.copytree(next_family.folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if name.endswith("q_proj.weight") and "language_model" in name)
    del weights[gone]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = verify_checkpoint(folder, device="cpu")
    assert results(report.checks) == {name: FAILED if name == LOADS else SKIPPED for name in CONTRACTS}
    assert "q_proj.weight" in report.checks[0].figure and rbl(folder).exit_code == 1


def test_what_loading_reports_is_read(next_family):
    model = next_family.pruned()
    loading = {"mismatched_keys": [("lm_head.weight", (1, 2), (3, 4))]}
    assert "lm_head.weight" in verify(model, next_family.processor, loading_info=loading)[0].figure
    first, *others = verify(model, next_family.processor)
    assert first.result == SKIPPED and "loading_info" in first.figure and not failed(others)
    first = verify(model, next_family.processor, loading_info={"unexpected_keys": {"extra.weight"}})[0]
    assert first.result == PASSED and "extra.weight" in first.figure
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    checks = verify(model, next_family.processor, loading_info={})
    assert checks[0].result == FAILED and "lm_head.weight" in checks[0].figure
    assert {KEEP_ALL, ORACLE, BATCH, STATIC, *TURNS.values()} <= failed(checks)


def test_a_tokenizer_without_padding_takes_no_batches(next_family):
    processor = AutoProcessor.from_pretrained(next_family.folder)
    processor.tokenizer.pad_token = None
    checks = verify(next_family.pruned(), processor)
    skipped = {check.name: check.figure for check in checks if check.result == SKIPPED}
    assert set(skipped) == {LOADS, BATCH, *TURNS.values()} and "no padding token" in skipped[BATCH]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["{model}", "--keep-ratio", "1.5"], "keep_ratio"),
        (["{model}", "--image", "{model}/config.json"], "no image"),
        (["{model}", "--codebook", "{model}"], "is a model without a codebook: build one with"),
        (["{model}", "--codebook", "{wide}"], "width 5"),
        (["{model}", "--dtype", "int4"], "--dtype"),
    ],
)
def test_wrong_input_gets_a_sentence(next_family, tmp_path, words, said):
    RedundancyCodebook(torch.ones(2, 5)).save_pretrained(tmp_path)
    result = rbl(*(word.format(model=next_family.folder, wide=tmp_path) for word in words))
    assert result.exit_code == 2 and result.stdout == ""
    assert said in result.stderr.splitlines()[-1]


def test_without_a_checkout_it_asks_for_a_model(monkeypatch):
    def missing():
        raise ValueError("not here")

    monkeypatch.setattr(loading, "default_model", missing)
    result = rbl()
    assert result.exit_code == 2 and "give MODEL" in result.stderr


def test_a_model_that_cannot_be_checked_is_refused(next_family):
    model = next_family.rbl_class.from_pretrained(next_family.folder).eval()
    with pytest.raises(ValueError, match="no codebook"):
        verify(model, next_family.processor)
    model.set_codebook(next_family.codebook)
    with pytest.raises(ValueError, match="eval"):
        verify(model.train(), next_family.processor)
    model.eval().hf_device_map = {"model.vision_tower": 0, "model.language_model": "cpu"}
    with pytest.raises(ValueError, match="device_map"):
        verify(model, next_family.processor)
    del model.hf_device_map
    model.config.full_length_logits = True
    with pytest.raises(ValueError, match="full_length_logits"):
        verify(model, next_family.processor)


def test_the_stock_class_shares_the_weights(family, pruned, stock, one):
    before = {name: (value.data_ptr(), value.requires_grad) for name, value in pruned.named_parameters()}
    twin = stock_twin(pruned)
    assert type(twin) is family.stock_class and not twin.training
    assert {name: value.data_ptr() for name, value in twin.named_parameters()} == {
        name: pointer for name, (pointer, _) in before.items()
    }
    assert not any(buffer.is_meta for buffer in twin.buffers())
    assert {name: (value.data_ptr(), value.requires_grad) for name, value in pruned.named_parameters()} == before
    with torch.no_grad():
        assert torch.equal(twin(**one).logits, stock(**one).logits)


def decoded(ids, logits):
    ids = torch.tensor([ids])
    return Decoded(ids, torch.tensor([logits]), ids, None)


@pytest.mark.parametrize(
    ("dtype", "theirs", "same"),
    [
        (torch.bfloat16, [4.0, 3.9, 0.0], True),  # within 5% of 4
        (torch.bfloat16, [4.0, 3.7, 0.0], False),
        (torch.float16, [4.0, 3.99, 0.0], True),
        (torch.float16, [4.0, 3.9, 0.0], False),
        (torch.float32, [4.0, 4.0, 0.0], True),
        (torch.float32, [4.0, 3.99999, 0.0], False),
    ],
)
def test_answers_part_at_ties_alone(dtype, theirs, same):
    subject = Subject(SimpleNamespace(dtype=dtype), None, None, drawn_picture(8, 8), RULE)
    # What follows a tie is another answer, and may differ as it will.
    first, second = decoded([0, 1], [theirs, [9.0, 0.0, 0.0]]), decoded([1, 2], [theirs, [0.0, 0.0, 4.0]])
    if same:
        assert "1 of 1 answers part at a tie" in subject.same_answer(first, second)
    else:
        with pytest.raises(Broken, match="new token 1 of prompt 1 is 0, not 1"):
            subject.same_answer(first, second)


def test_logits_that_are_no_numbers_are_not_the_same():
    subject = Subject(SimpleNamespace(dtype=torch.float32), None, None, drawn_picture(8, 8), RULE)
    number, none = torch.ones(1, 2, 3), torch.full((1, 2, 3), torch.nan)
    for ours, theirs in ((number, none), (none, number), (none, none), (number, number[:, :1])):
        with pytest.raises(Broken):
            subject.same_logits(ours, theirs)
    with pytest.raises(Broken, match="nan"):
        subject.same_answer(decoded([0], [[torch.nan] * 3]), decoded([0], [[1.0, 2.0, 3.0]]))
