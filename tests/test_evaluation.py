"""Evaluation and calibration: metrics, one pass over the images for all rules, intervals, thresholds, commands."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiny_checkpoint
from conftest import GREEDY, visual
from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.cli import app
from transformers_rbl.evaluation.calibrate import image_scores, lowest_retention, mean_retention, threshold_for
from transformers_rbl.evaluation.evaluate import RuleResult, evaluate, prompt_inputs, table_rows, write_results
from transformers_rbl.evaluation.metrics import (
    bootstrap_interval,
    choice,
    exact,
    f1,
    normalised,
    paired_ratio_interval,
    yes_no,
)
from transformers_rbl.evaluation.plots import plot_accuracy, plot_frames, plot_kept, plot_retentions
from transformers_rbl.evaluation.questions import Question, question_count, read_questions
from transformers_rbl.evaluation.timing import compare_prefills
from transformers_rbl.models.layout import NEWLINE
from transformers_rbl.models.scorers import SCORERS, chooses
from transformers_rbl.wording import describe_pruning


OFF = PruningConfig(enabled=False)


@pytest.mark.parametrize(
    ("metric", "answer", "references", "right"),
    [
        (exact, " cat ", ["cat"], 1),
        (exact, "Cat", ["cat"], 0),
        (normalised, "The two cats.", ["2 cats"], 1),
        (normalised, "cats", ["dogs", "Cats!"], 1),
        (normalised, "a", ["the"], 1),
        (normalised, "three", ["2"], 0),
        (choice, "B", ["(b)"], 1),
        (choice, "B. a dog", ["B"], 1),
        (choice, "The answer is C.", ["C"], 1),
        (choice, "A dog", ["A"], 0),
        (choice, "dog", ["d"], 0),
        (choice, "", ["A"], 0),
        (yes_no, "Yes, it is.", ["yes"], 1),
        (yes_no, "no", ["yes"], 0),
        (yes_no, "maybe", ["no"], 0),
    ],
)
def test_metrics(metric, answer, references, right):
    assert metric(answer, references) == right


def test_f1_of_yes():
    answers, references = ["yes", "yes", "no", "perhaps"], [["yes"], ["no"], ["yes"], ["no"]]
    assert f1(answers, references) == pytest.approx(2 * 1 / (2 + 2))
    assert f1(["no"], [["no"]]) == 0


def test_intervals_hold_what_they_should():
    values = np.array([1.0] * 70 + [0.0] * 30)
    low, high = bootstrap_interval(values)
    assert 0.58 < low < 0.65 and 0.75 < high < 0.82
    assert paired_ratio_interval(values, values) == (1.0, 1.0)
    assert all(np.isnan(paired_ratio_interval(values, values * 0)))


@pytest.fixture
def questions(family):
    return [
        Question([family.images(2)[1]], "What?", ["x"]),
        Question(family.images(2), "Which?", ["y"]),
        Question([family.images(1)[0]], "How many?", ["z", "w"]),
    ]


RULES = [
    PruningConfig(keep_ratio=0.3),
    PruningConfig(keep_ratio=0.3, tiles="base", newlines="last"),
    PruningConfig(threshold=0.2),
    PruningConfig(keep_ratio=0.3, score="random"),
    PruningConfig(keep_ratio=1.0),
]


def test_one_pass_gives_what_each_rule_gives_by_itself(family, pruned, questions):
    """Answers equal those of plain `generate` calls; the vision tower runs once a question."""
    encoded = []
    hook = pruned.model.vision_tower.register_forward_pre_hook(lambda *_: encoded.append(1))
    peers = [PruningConfig(keep_ratio=0.3, score="visionzip"), PruningConfig(keep_ratio=0.3, score="cdpruner")]
    rules = [*RULES[:-1], *peers, PruningConfig(keep_ratio=0.3, merge="nearest"), RULES[-1]]
    results, references = evaluate(pruned, family.processor, questions, rules, ["exact"], max_new_tokens=5)
    hook.remove()
    assert len(encoded) == len(questions) and references == [["x"], ["y"], ["z", "w"]]
    assert [result.name for result in results][:2] == ["unpruned", "cosine, keep_ratio 0.3"]
    for number, question in enumerate(questions):
        content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.text}]
        text = family.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = family.inputs([text], question.images)
        for result, rule in zip(results, (OFF, *rules)):
            kwargs = {"max_new_tokens": 5, "do_sample": False, "pruning": rule}
            ids = pruned.generate(**inputs, **kwargs)[:, inputs.input_ids.shape[1] :]
            assert result.answers[number] == family.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    first, last = results[0], results[-1]
    assert first.retention == last.retention == 1 and first.answers == last.answers
    assert results[1].cache_mib < first.cache_mib and 0 < results[1].retention < 1
    assert results[2].tokens < results[1].tokens or not family.has_tiles
    # One word, one meaning: a ratio's retention is the ratio, and what calibrate promises for a threshold.
    assert abs(results[1].retention - 0.3) < 0.02
    scores = [
        image_scores(pruned, family.processor, question.images) for question in questions if len(question.images) == 1
    ]
    by_threshold = [evaluate(pruned, family.processor, [q], [RULES[2]], ["exact"], 1)[0][1] for q in questions]
    shares = [result.retention for result, q in zip(by_threshold, questions) if len(q.images) == 1]
    assert shares == pytest.approx([mean_retention(values, 0.2) for values in scores])


@pytest.mark.parametrize("size", [2, 3, 8])
def test_batches_give_what_single_questions_give(family, pruned, questions, size):
    rules = [*RULES, PruningConfig(keep_ratio=0.3, score="cdpruner")]
    forwards = []
    hook = pruned.model.language_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    ask = partial(evaluate, pruned, family.processor, questions, rules, ["exact"], 5)
    single, said = ask()
    alone = len(forwards)
    batched, references = ask(batch_size=size)
    hook.remove()
    assert references == said and len(forwards) - alone < alone
    for one, many in zip(single, batched, strict=True):
        assert one.answers == many.answers and one.correct == many.correct
        assert (one.tokens, one.retention, one.cache_mib) == (many.tokens, many.retention, many.cache_mib)


def test_batches_that_cannot_be_made(family, pruned, questions):
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(pruned, family.processor, questions, [], ["exact"], batch_size=0)
    processor = copy.deepcopy(family.processor)
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no token to pad with"):
        evaluate(pruned, processor, questions, [], ["exact"], batch_size=2)


@pytest.mark.parametrize("rule", [*RULES, PruningConfig(keep_ratio=0.3, score="cls_similarity_low")], ids=str)
def test_features_pruned_afterwards_equal_features_pruned_at_once(family, pruned, batch, rule):
    if rule.needs_cls_similarity and family.name == "llava_onevision":
        pytest.skip("SigLIP has no [cls]")
    encoded = pruned.get_image_features(**visual(batch), pruning=OFF, return_dict=True)
    after = pruned.model.prune_image_features(encoded, rule, **visual(batch))
    at_once = pruned.get_image_features(**visual(batch), pruning=rule, return_dict=True)
    for one, other in zip(after.keep_masks, at_once.keep_masks, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(after.pooler_output, at_once.pooler_output, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    text = {key: batch[key] for key in ("input_ids", "attention_mask")}
    sequences = pruned.generate(**text, mm_encoder_outputs={"image": after}, **GREEDY)
    assert torch.equal(sequences, pruned.generate(**batch, pruning=rule, **GREEDY))


def result(name, retention, correct):
    return RuleResult(name, PruningConfig(keep_ratio=retention).to_dict(), retention, 1, {"exact": correct}, [])


def test_the_lowest_retention_that_keeps_a_share():
    base = result("unpruned", 1.0, [1, 1, 1, 1, 0])
    rules = [result("half", 0.5, [1, 1, 1, 1, 0]), result("some", 0.2, [1, 1, 1, 0, 0]), result("few", 0.1, [0] * 5)]
    assert lowest_retention([base, *rules], 0.97, "exact")[0].name == "half"
    assert lowest_retention([base, *rules], 0.7, "exact")[0].name == "some"
    assert lowest_retention([base, rules[2]], 0.7, "exact") is None
    with pytest.raises(ValueError, match="nothing right"):
        lowest_retention([rules[2], rules[0]], 0.9, "exact")


def test_a_threshold_for_a_retention_is_checked_on_other_images():
    random = torch.Generator().manual_seed(0)
    scores = [torch.rand(200, generator=random) for _ in range(40)]
    found = threshold_for(scores, 0.15)
    assert found.threshold == pytest.approx(0.15, abs=0.02) and found.images == (20, 20)
    assert found.fitted == pytest.approx(0.15, abs=0.002)
    assert found.overshoot == pytest.approx(found.checked - 0.15) and abs(found.overshoot) < 0.02
    assert threshold_for(scores, 1.0).fitted == 1.0
    assert mean_retention(scores, -1) == pytest.approx(1 / 200)
    for target, words in ((0, "in \\(0, 1\\]"), (1.5, "in \\(0, 1\\]")):
        with pytest.raises(ValueError, match=words):
            threshold_for(scores, target)
    with pytest.raises(ValueError, match="two images"):
        threshold_for(scores[:1], 0.5)


@pytest.mark.parametrize("score", sorted({name for name in SCORERS if not chooses(name)} - {"random", "cdpruner"}))
def test_scores_of_images_are_those_that_pruning_uses(family, pruned, score):
    images = family.images(3)
    if score.startswith("cls_similarity") and family.name == "llava_onevision":
        pytest.skip("SigLIP has no [cls]")
    for values, image in zip(image_scores(pruned, family.processor, images, score), images):
        one = family.inputs(["<s> <image>"], [image])
        cut = float(values.sort().values[len(values) // 2])
        kept = pruned(**one, pruning=PruningConfig(threshold=cut, score=score)).keep_masks[0]
        kinds = pruned.model.token_kinds(**visual(one))[0]
        assert torch.equal(kept[kinds != NEWLINE], values < cut)


def test_a_score_that_cannot_be_calibrated_is_refused_before_the_model_runs(family, pruned):
    def refused(model, score, words):
        opened = []
        images = (opened.append(image) or image for image in family.images(2))
        with pytest.raises(ValueError, match=words):
            image_scores(model, family.processor, images, score)
        assert not opened

    bare = family.rbl_class.from_pretrained(family.folder).eval()
    refused(pruned, "random", "the retention itself is its threshold")
    refused(pruned, "cdpruner", "reads the question")
    refused(pruned, "tome", "has no threshold")
    refused(pruned, "luck", "score must be one of")
    refused(bare, "softmax", "this model has none: give codebook=")
    if family.name == "llava_onevision":
        refused(pruned, "cls_similarity_high", "needs a vision tower with a \\[cls\\] token")
    scores = [image_scores(model, family.processor, family.images(2), "diversity") for model in (bare, pruned)]
    assert all(map(torch.equal, *scores))


def test_nothing_to_look_at_gets_a_sentence(family, pruned, tmp_path):
    def ask(question):
        return evaluate(pruned, family.processor, [question], [], ["yes_no"])

    base, picture, mask = result("unpruned", 1.0, [1]), tmp_path / "picture.png", torch.ones(5, dtype=torch.bool)
    for empty, words in (
        (lambda: evaluate(pruned, family.processor, [], [], ["exact"]), "no questions to ask"),
        (lambda: ask(Question([], "What?", ["x"])), "comes with no image"),
        (lambda: ask(Question(family.images(1), "What?", [])), "has no answer"),
        (lambda: threshold_for(image_scores(pruned, family.processor, []), 0.5), "two images at least"),
        (lambda: mean_retention([], 0.5), "no images"),
        (lambda: lowest_retention([], 0.5, "exact"), "no results"),
        (lambda: table_rows([], []), "no results"),
        (lambda: write_results(tmp_path / "none", [], [], {}), "no results"),
        (lambda: plot_accuracy([], picture), "no results"),
        (lambda: plot_kept([], [], [], picture), "no images to draw"),
        (lambda: plot_retentions([], [[]], [], ["all"], picture), "no images to draw"),
        (lambda: plot_frames([], [mask], ["all"], picture), "no frames to draw"),
        (lambda: bootstrap_interval(np.array([])), "no values"),
        (lambda: paired_ratio_interval(np.array([]), np.array([])), "no values"),
        (lambda: compare_prefills(pruned, {}, {}, 1), "one setting"),
        (lambda: compare_prefills(pruned, {}, {"stock": OFF}, 0), "one repeat"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            empty()
        assert str(error.value).count(".") == 1
    assert list(tmp_path.iterdir()) == [] and lowest_retention([base], 0.5, "exact") is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep_ratio": 0.3}, "cosine, keep_ratio 0.3"),
        ({"threshold": 0.5, "score": "softmax"}, "softmax, threshold 0.5"),
        ({"keep_ratio": 0.3, "tiles": "base", "newlines": "last"}, "cosine, keep_ratio 0.3, newlines last, tiles base"),
        ({"keep_ratio": 0.3, "score": "random", "seed": 4}, "random, keep_ratio 0.3, seed 4"),
        ({"keep_ratio": 0.3, "keep_positions": True}, "cosine, keep_ratio 0.3, keep_positions True"),
        (
            {"threshold": 0.5, "min_tokens": 8, "per_frame": False},
            "cosine, threshold 0.5, min_tokens 8, per_frame False",
        ),
        ({"keep_ratio": 0.3, "enabled": False}, "unpruned"),
    ],
)
def test_a_setting_in_words_tells_whatever_is_not_default(settings, words):
    assert describe_pruning(PruningConfig(**settings)) == words
    assert describe_pruning(None) == "unpruned"


@pytest.fixture(scope="module")
def files(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number, image in enumerate(family.images(6)):
        image.save(folder / f"{number}.png")
    rows = [{"image": f"{n}.png", "question": "What?", "answer": ["x", "y"]} for n in range(5)]
    rows.append({"image": ["0.png", "1.png"], "question": "Same?", "answer": "yes"})
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    family.codebook.save_pretrained(folder / "book")
    return folder


def run(*arguments):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [str(item) for item in arguments])


def test_the_evaluate_command(family, files, tmp_path):
    arguments = ("evaluate", "--model", family.folder, "--codebook", files / "book", "--data", files / "data.jsonl")
    rules = "--keep-ratio 0.5 --keep-ratio 0.2 --threshold 0.3 --score cosine --score random".split()
    metrics = "--metric exact --metric yes_no --max-new-tokens 3".split()
    output = run(*arguments, "--out", tmp_path, *rules, *metrics)
    assert output.exit_code == 0 and "6/6" in output.stderr, output.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert [entry["name"] for entry in found["results"]] == [
        "unpruned",
        "cosine, keep_ratio 0.5",
        "cosine, keep_ratio 0.2",
        "random, keep_ratio 0.5",
        "random, keep_ratio 0.2",
        "cosine, threshold 0.3",
    ]
    assert found["about"]["questions"] == 6 and len(found["results"][1]["answers"]) == 6
    report = (tmp_path / "results.md").read_text()
    assert report.count("\n| ") == 8 and "yes F1" in report and "[" in report
    assert Image.open(tmp_path / "accuracy.png").size[0] > 300 and "random, keep_ratio 0.2" in output.output


def test_baselines_are_evaluated_without_a_codebook(family, files, tmp_path):
    arguments = ("evaluate", "--model", family.folder, "--data", files / "data.jsonl", "--out", tmp_path, "--limit", 2)
    assert run(*arguments, "--score", "diversity", "--keep-ratio", 0.3).exit_code == 0
    assert "no codebook" in run(*arguments, "--out", tmp_path / "other").stderr


def test_every_score_is_run_or_listed_with_the_reason(family, files, tmp_path):
    """Without a codebook, those that need none are run; the others are named with the library's own sentence."""
    arguments = ("evaluate", "--model", family.folder, "--data", files / "data.jsonl", "--limit", 1)
    output = run(*arguments, "--score", "all", "--keep-ratio", 0.5, "--out", tmp_path)
    assert output.exit_code == 0, output.output
    content = json.loads((tmp_path / "results.json").read_text())
    ran = {row["pruning"]["score"] for row in content["results"][1:]}
    refused = {name.removeprefix("not run: "): why for name, why in content["about"].items() if "not run" in name}
    assert ran | set(refused) == set(SCORERS) and not ran & set(refused)
    assert {"random", "diversity"} <= ran and "codebook" in refused["cosine"]
    assert all(f"{name} was not run" in output.output for name in refused)


def test_the_calibrate_command(family, files, tmp_path):
    import shutil

    book = tmp_path / "book"
    shutil.copytree(files / "book", book)
    arguments = ("calibrate", "--model", family.folder, "--codebook", book)
    output = run(*arguments, "--images", files, "--retention", 0.3, "--write")
    assert output.exit_code == 0 and "overshoot" in output.output, output.output
    threshold = RedundancyCodebook.from_pretrained(book).recommended_threshold
    assert f"{threshold:.4f}" in output.output and "written into" in output.output
    model = family.rbl_class.from_pretrained(family.folder, codebook=book).eval()
    assert model.pruning == PruningConfig(threshold=threshold)
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.png"):
        (photos / name).write_bytes(b"no image")
    output = run(*arguments, "--images", photos)
    assert output.exit_code == 2 and "None of 2 images could be read (the first, a.png: " in output.stderr
    for number in range(2):
        shutil.copyfile(files / f"{number}.png", photos / f"{number}.png")
    output = run(*arguments, "--images", photos)
    assert output.exit_code == 0 and "2 images could not be read and were left out" in output.output
    output = run(*arguments, "--data", files / "data.jsonl", "--keep-ratio", 0.5, "--max-new-tokens", 2)
    assert output.exit_code == 2 and "answers nothing right" in output.stderr


def test_calibrating_on_labels(family, pruned, files, tmp_path):
    """The model's own answers as labels: unpruned it is always right, and keeping all keeps that."""
    questions = [Question([Image.open(files / f"{n}.png").convert("RGB")], "What?", ["?"]) for n in range(4)]
    results, _ = evaluate(pruned, family.processor, questions, [], ["exact"], max_new_tokens=4)
    for number, answer in enumerate(results[0].answers):
        row = {"picture": str(files / f"{number}.png"), "asked": "What?", "said": answer}
        with (tmp_path / "own.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    family.codebook.save_pretrained(tmp_path / "book")
    columns = "--image-column picture --question-column asked --answer-column said --metric exact".split()
    ratios = "--keep-ratio 1.0 --keep-ratio 0.05 --max-new-tokens 4 --write".split()
    files = ("--codebook", tmp_path / "book", "--data", tmp_path / "own.jsonl")
    output = run("calibrate", "--model", family.folder, *files, *columns, *ratios)
    assert output.exit_code == 0 and "4 questions" in output.output, output.output
    kept = RedundancyCodebook.from_pretrained(tmp_path / "book").recommended_keep_ratio
    assert kept in (1.0, 0.05) and f"keep_ratio {kept}" in output.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "--data", "@missing.jsonl"], "is no file, folder or dataset"),
        (["evaluate", "--data", "@data.jsonl", "--metric", "bleu"], "--metric is one of exact"),
        (["evaluate", "--data", "@data.jsonl", "--question-column", "q"], "has no q in row 0"),
        (["evaluate", "--data", "@broken.jsonl"], "Line 1 of"),
        (["evaluate", "--data", "@0.png"], "is no JSON Lines file"),
        (["evaluate", "--data", "@data.jsonl", "--keep-ratio", "3"], "in (0, 1]"),
        (["evaluate", "--data", "@data.jsonl", "--score", "luck"], "score must be one of"),
        (["evaluate", "--data", "@data.jsonl", "--score", "all", "--score", "random"], "leave the others out"),
        (["evaluate", "--data", "@data.jsonl", "--score", "random", "--threshold", "0.5"], "--threshold is for score"),
        (["evaluate", "--data", "@empty.jsonl", "--score", "all"], "no questions"),
        (
            ["evaluate", "--data", "@data.jsonl", "--device", "cuda:99"],
            "--device cuda:99 cannot be had: this machine has cpu",
        ),
        (["evaluate", "--data", "@empty.jsonl"], "no questions"),
        (["evaluate", "--data", "@data.jsonl", "--streaming"], "give --limit"),
        (["calibrate"], "Give --images"),
        (["calibrate", "--data", "@data.jsonl", "--share", "0"], "--share is of the unpruned"),
        (["calibrate", "--images", "@.", "--retention", "7"], "in (0, 1]"),
        (["calibrate", "--images", "@.", "--write", "--codebook", "org/book"], "--write needs --codebook, a folder"),
    ],
)
def test_wrong_input_gets_one_sentence(family, files, tmp_path, arguments, words):
    (files / "broken.jsonl").write_text("{")
    (files / "empty.jsonl").write_text("")
    arguments = [str(files / item[1:]) if item.startswith("@") else item for item in arguments]
    common = ["--model", family.folder]
    common += ["--out", tmp_path] if arguments[0] == "evaluate" else []
    common += [] if "--codebook" in arguments else ["--codebook", files / "book"]
    output = run(*arguments, *common)
    assert output.exit_code == 2 and words in output.stderr, output.output
    assert len([line for line in output.stderr.splitlines() if line.startswith("rbl: ")]) == 1


def test_the_table_shows_shares_of_the_unpruned_model():
    base, rule = result("unpruned", 1.0, [1, 1, 0, 0]), result("half", 0.5, [1, 0, 0, 0])
    for item in (base, rule):
        item.prefill_ms = item.cache_mib = 1.0
    columns, rows = table_rows([base, rule], [["x"]] * 4)
    assert dict(zip(columns, rows[0]))["exact, of unpruned"].startswith("100.0%")
    assert dict(zip(columns, rows[1]))["exact"].startswith("25.0% [")
    assert dict(zip(columns, rows[1]))["exact, of unpruned"].startswith("50.0% [")


def test_a_missing_image_names_its_row(tmp_path):
    rows = [{"image": name, "question": "?", "answer": "x"} for name in ("a.png", "gone.png")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(OSError, match=r"image of row 1 of .*data\.jsonl cannot be read: .*gone\.png"):
        list(read_questions(tmp_path / "data.jsonl"))
    assert question_count(tmp_path / "data.jsonl") == 2 and question_count(tmp_path / "data.jsonl", limit=1) == 1


def test_images_stand_where_the_question_puts_them(family):
    images, tokenizer = family.images(2), family.processor.tokenizer

    def ids(text):
        inputs = prompt_inputs(family.processor, Question(images, text, [""]), "", "cpu", torch.float32)
        return inputs.input_ids[0].tolist()

    def places(found):
        return [place for place, id_ in enumerate(found) if id_ == tiny_checkpoint.IMAGE]

    first, inside = ids("what?"), ids("one <image> two <image> what?")
    assert len(places(first)) == len(places(inside))
    between = tokenizer.decode(inside[places(inside)[0] : places(inside)[-1]], skip_special_tokens=True)
    assert "two" in between and "one" not in between
    assert "two" not in tokenizer.decode(first[: places(first)[-1]])
    with pytest.raises(ValueError, match="3 times <image>, but comes with 2 images"):
        ids("<image> <image> <image> what?")
