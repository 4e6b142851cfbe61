"""Evaluation, calibration, explanations, demo, pictures and `rbl verify` on families that came after LLaVA."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import small_families
from small_families import IMAGE
from transformers_rbl import PruningConfig, RedundancyCodebook, demo
from transformers_rbl.cli import app
from transformers_rbl.evaluation.calibrate import image_scores, mean_retention, threshold_for
from transformers_rbl.evaluation.evaluate import OFF, evaluate, prompt_inputs
from transformers_rbl.evaluation.explain import explain
from transformers_rbl.evaluation.plots import kept_grids
from transformers_rbl.evaluation.questions import Question
from transformers_rbl.inputs import image_arguments, inputs_with_features, layout_of, split_inputs
from transformers_rbl.models.layout import VisualLayout
from transformers_rbl.verify import CONTRACTS, FAILED, MEASURED, PASSED, SKIPPED, verify_checkpoint


SOME = PruningConfig(keep_ratio=0.3)


@pytest.fixture(scope="module", params=["qwen3_vl", "internvl"])
def family(request, tmp_path_factory):
    return small_families.family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(family):
    return family.pruned()


@pytest.fixture
def questions():
    wide, high, square = small_families.photos()
    return [Question([wide], "What?", ["x"]), Question([high, square], "Which?", ["y"])]


def inputs_of(family, question):
    return prompt_inputs(family.processor, question, "", "cpu", torch.float32)


def test_answers_are_those_of_generate(family, model, questions):
    """Encoding once for all rules changes no answer: positions, deepstack rows and budgets of tiles go along."""
    rules = [SOME, PruningConfig(threshold=0.3)]
    results, references = evaluate(model, family.processor, questions, rules, ["exact"], max_new_tokens=4)
    assert references == [["x"], ["y"]]
    for rule, result in zip([OFF, *rules], results, strict=True):
        shares, counts = [], []
        for question, answer in zip(questions, result.answers, strict=True):
            inputs = inputs_of(family, question)
            output = model.generate(
                **inputs, pruning=rule, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
            )
            ids = output.sequences[:, inputs["input_ids"].shape[1] :]
            assert answer == family.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
            whole = int((inputs["input_ids"] == IMAGE).sum())
            counts.append(whole if rule is OFF else sum(int(mask.sum()) for mask in output.keep_masks))
            shares.append(counts[-1] / whole)
        assert result.tokens == np.mean(counts) and result.retention == pytest.approx(np.mean(shares))
        assert result.prefill_ms > 0 and result.cache_mib > 0
    for size in (2, 3):
        batched, _ = evaluate(model, family.processor, questions, rules, ["exact"], max_new_tokens=4, batch_size=size)
        for one, many in zip(results, batched, strict=True):
            assert (one.answers, one.tokens, one.retention) == (many.answers, many.tokens, many.retention)
    assert results[1].cache_mib < results[0].cache_mib


def test_the_evaluate_command(family, questions, tmp_path):
    family.codebook.save_pretrained(tmp_path / "book")
    lines = []
    for number, question in enumerate(questions[:1]):
        question.images[0].save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": question.text, "answer": "x"}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    words = ["--model", family.folder, "--codebook", tmp_path / "book", "--data", tmp_path / "questions.jsonl"]
    words += ["--out", tmp_path / "out", "--keep-ratio", 0.5, "--max-new-tokens", 2, "--device", "cpu"]
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["retention"] for row in written["results"]] == [1.0, 0.5]


def test_calibration_meets_its_target(family, model):
    scores = image_scores(model, family.processor, small_families.photos(6))
    for score, photo in zip(scores, small_families.photos(6), strict=True):
        inputs = inputs_of(family, Question([photo], "Anything else?", []))
        assert len(score) == int((inputs["input_ids"] == IMAGE).sum())
        output = model(**inputs, pruning=PruningConfig(threshold=0.25))
        assert int((score < 0.25).sum()) == sum(int(mask.sum()) for mask in output.keep_masks)
    fit = threshold_for(scores, 0.4)
    assert abs(fit.fitted - 0.4) < 0.05
    assert mean_retention(scores, fit.threshold) == pytest.approx((fit.fitted + fit.checked) / 2)


def test_each_token_is_explained(family, model, questions):
    inputs = inputs_of(family, questions[0])
    tokens = model.get_image_features(**image_arguments(model, inputs), pruning=OFF, return_dict=True).pooler_output
    tokens = torch.cat(list(tokens))
    book = RedundancyCodebook(tokens[[3, 5]])
    rows = [{"image": "a.png", "position": "7", "word_1": "sky", "word_2": "", "word_3": ""}] * 2
    explanations = explain(book, tokens, rows)
    assert [explanations[3].prototype, explanations[5].prototype] == [0, 1]
    assert explanations[3].score == pytest.approx(1, abs=1e-5) and len(explanations) == len(tokens)


@pytest.fixture
def stand(family, model, tmp_path):
    family.codebook.save_pretrained(tmp_path / "book")
    (tmp_path / "images").mkdir()
    small_families.photos(1)[0].save(tmp_path / "images" / "photo.png")
    return demo.load_demo(family.folder, tmp_path / "book", tmp_path / "images", device="cpu")


def test_the_demo_asks(family, model, stand):
    """Native resolution: rows and columns of patches over the whole photo. Tiles whose place is not known: no patches,
    and it says so."""
    photo = demo.open_photo(stand.images[0])
    answer = demo.ask(stand, photo, "what?", demo.RATIO, 0.25, repeats=1, max_new_tokens=2)
    inputs = inputs_of(family, Question([photo], "what?", []))
    whole = int((inputs["input_ids"] == IMAGE).sum())
    assert answer.stock.tokens == whole == len(answer.explanations) == len(answer.keep_mask)
    assert answer.pruned.tokens == round(whole / 4) and answer.image.size == photo.size
    if family.name == "internvl":
        assert answer.grids == {} and "none of its patches is shown" in demo.figures(answer)
        with pytest.raises(ValueError, match="Ask a question first"):
            demo.explain_click(stand, answer, "base", 1, 1)
        return
    rows, columns = [int(n) // 2 for n in inputs["image_grid_thw"][0, 1:]]
    assert rows != columns and answer.grids["base"].tolist() == torch.arange(whole).view(rows, columns).tolist()
    width, height = demo.picture(answer, "base").size
    click = demo.explain_click(stand, answer, "base", width - 1, height / rows * 1.5)
    assert click.token == 2 * columns - 1 and f"row 2, column {columns}" in click.text
    assert "none of its patches" not in demo.figures(answer)


def test_a_single_tile_is_shown(tmp_path):
    """One tile covers the photo as a square grid."""
    internvl = small_families.family(tmp_path / "model", "internvl")
    internvl.codebook.save_pretrained(tmp_path / "book")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (56, 56), "red").save(tmp_path / "images" / "square.png")
    stand = demo.load_demo(tmp_path / "model", tmp_path / "book", tmp_path / "images", device="cpu")
    answer = demo.ask(stand, demo.open_photo(stand.images[0]), "what?", repeats=1, max_new_tokens=1)
    assert answer.grids["base"].shape == (4, 4) and answer.image.size == (56, 56)


def test_where_tokens_lie_is_not_guessed():
    native = VisualLayout.of_patches(6, grid=(2, 3))
    assert layout_of([native], [6], [6]) is native and layout_of([native, native], [6, 6], [6, 6]) is None
    assert layout_of(None, [16], [16]).grids["base"].shape == (4, 4)
    assert layout_of(None, [6], [3, 3]).grids["base"].tolist() == [[0, 1, 2], [3, 4, 5]]  # text ends the rows
    assert layout_of(None, [16, 16, 16, 16], [64]) is None  # four tiles are no square of 8 x 8
    assert layout_of(None, [16, 16], [16, 16]) is None and layout_of(None, [24], [24]) is None
    assert layout_of(None, [5], [3, 2]) is None
    assert kept_grids(torch.ones(6).bool(), native)["base"].shape == (2, 3)


def test_a_processors_output_in_two(family, model, questions):
    inputs = inputs_of(family, questions[0])
    along, visual = split_inputs(inputs)
    assert {**along, **visual}.keys() == inputs.keys() and {"input_ids", "attention_mask"} <= along.keys()
    assert ("mm_token_type_ids" in along) is (family.name == "qwen3_vl") is ("image_grid_thw" in visual)
    prompt = inputs_with_features(model, inputs, None)
    assert "pixel_values" not in prompt and ("image_grid_thw" in prompt) is (family.name == "qwen3_vl")
    with pytest.raises(ValueError, match="returns num_crops"):
        split_inputs({**inputs, "num_crops": 3})


def test_verify_holds_it_against_the_kept_tokens_by_hand(family):
    report = verify_checkpoint(family.folder, device="cpu")
    assert [check.name for check in report.checks] == list(CONTRACTS) and report.passed
    results = [check.result for check in report.checks]
    assert results == [PASSED] * (len(results) - 1) + [MEASURED], [c for c in report.checks if c.result == SKIPPED]


def test_verify_notices_renumbered_positions(tmp_path, monkeypatch):
    """Kept tokens of m-RoPE families keep their own positions: closing the gaps is another answer."""
    from transformers_rbl.models import modeling_rbl

    small_families.build(tmp_path, "qwen3_vl")
    monkeypatch.setattr(
        modeling_rbl, "compact_positions", lambda plan, position_ids: plan.attention_mask.long().cumsum(-1) - 1
    )
    checks = {check.name: check for check in verify_checkpoint(tmp_path, device="cpu").checks}
    oracle = checks["The answer is that of kept tokens by hand"]
    assert oracle.result == FAILED and "logits differ" in oracle.figure


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "mistral3", "qwen3_5"])
def test_verify_of_other_mechanisms(name, tmp_path):
    small_families.build(tmp_path, name)
    assert verify_checkpoint(tmp_path, device="cpu").passed
