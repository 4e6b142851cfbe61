"""The leaderboard: it goes on where it was killed, ranks fairly, and says what the figures say."""

import json

import numpy as np
import pytest
import torch

from testbeds.comparison import accuracy
from testbeds.encoding import encode_all
from testbeds.leaderboard import answers, command, times
from testbeds.leaderboard.answers import MERGE_POLICIES, ORACLE, RESIZED, UNPRUNED, Asked, Scenes
from testbeds.leaderboard.cases import committed_cases
from testbeds.leaderboard.ledger import Ledger
from testbeds.leaderboard.page import distance, page, stratified_interval
from testbeds.leaderboard.resizing import encode_resized
from testbeds.leaderboard.standing import Standing, mean_places
from testbeds.rules import keep_all, library_rule
from testbeds.tokens import encode
from transformers_rbl.models.pruning import PruningConfig, kept_token_count


CASES = {case.name: case for case in committed_cases() if case.testbed.name == "digits"}
SCENES = Scenes(3, "validation", 5)


def test_every_committed_digits_checkpoint_is_a_case():
    assert set(CASES) == {
        "digits-llava-1.5",
        "digits-llava-next",
        "digits-llava-onevision, images",
        "digits-llava-onevision, video",
        "digits-qwen3-vl",
    }


def test_a_ledger_makes_nothing_twice(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": len(made)}

    first = Ledger(tmp_path / "known.jsonl")
    assert first.get(("a", 0.5), make) == first.get(("a", 0.5), make) == {"value": 1}
    again = Ledger(tmp_path / "known.jsonl")
    assert again.get(("a", 0.5), make) == {"value": 1} and again.get(("a", 0.3), make) == {"value": 2}
    assert len(made) == 2


@pytest.mark.parametrize("name", CASES)
def test_resizing_to_all_tokens_is_the_unpruned_model_and_never_gets_fewer(name):
    asked = Asked(CASES[name], SCENES)
    whole = encode_resized(asked.model, asked.examples, 1.0)
    for ours, resized in zip(asked.encoded, whole, strict=True):
        torch.testing.assert_close(ours.tokens, resized.tokens, atol=1e-4, rtol=1e-4)
    before = [torch.clone(weights) for weights in asked.model.parameters()]
    for ratio in (0.33, 0.1):
        for ours, resized in zip(asked.encoded, encode_resized(asked.model, asked.examples, ratio), strict=True):
            lengths = [int((ours.group == part).sum()) for part in ours.group.unique() if part >= 0]
            wanted = sum(kept_token_count(length, ratio) for length in lengths)
            assert wanted <= int((resized.group >= 0).sum()) < len(ours.tokens)
    assert all(torch.equal(a, b) for a, b in zip(before, asked.model.parameters()))


def test_a_run_that_was_killed_goes_on_and_its_rows_are_those_of_one_run(tmp_path, monkeypatch):
    case, work = CASES["digits-llava-1.5"], tmp_path / "known.jsonl"
    scores, ratios = ("cosine", "random"), (0.3,)
    whole = answers.answer_all(case, SCENES, Ledger(tmp_path / "whole.jsonl"), scores, ratios)
    run, calls = Asked.run, []

    def dies(self, *setting):
        calls.append(setting)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(self, *setting)

    monkeypatch.setattr(Asked, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        answers.answer_all(case, SCENES, Ledger(work), scores, ratios)
    resumed = answers.answer_all(case, SCENES, Ledger(work), scores, ratios)
    assert resumed == whole and len(calls) == 1 + len(whole["rows"])
    monkeypatch.setattr(Asked, "model", property(lambda self: pytest.fail("everything is known")))
    assert answers.answer_all(case, SCENES, Ledger(work), scores, ratios) == whole

    asked = Asked(case, SCENES)
    monkeypatch.undo()
    right, _ = accuracy(asked.model, asked.tokenizer, encode_all(asked.model, asked.examples), keep_all)
    rows = {(row["rule"], row["merge"], row["wanted"]): row for row in whole["rows"]}
    assert rows[(UNPRUNED, "none", 1.0)]["right"] == "".join(str(int(row.sum())) for row in right)
    assert rows[(UNPRUNED, "none", 1.0)]["kept"] == 1 and rows[(UNPRUNED, "none", 1.0)]["found"] == 1
    for merge in MERGE_POLICIES:
        row = rows[("cosine", merge, 0.3)]
        assert row["kept"] == pytest.approx(0.3, abs=0.01) and sum(row["shows"].values()) == pytest.approx(1, abs=1e-3)
        assert rows[(ORACLE, "none", 0.3)]["found"] >= row["found"] > rows[("random", merge, 0.3)]["found"]


@pytest.mark.parametrize("name", ["digits-llava-next", "digits-llava-onevision, video", "digits-qwen3-vl"])
@pytest.mark.parametrize("settings", [{"merge": "nearest"}, {"score": "codebook_dpp"}, {"score": "tome"}])
def test_the_harness_prunes_and_merges_as_the_model_does(name, settings):
    """Tokens, those of deepstack, and where each lies."""
    asked, rule = Asked(CASES[name], SCENES), PruningConfig(keep_ratio=0.2, **settings)
    for item in asked.encoded:
        (kept,) = library_rule(rule, asked.model.model.codebook)([item])
        theirs = encode(asked.model, [item.example], pruning=rule)[0]
        for ours, image in zip(kept.images, theirs, strict=True):
            torch.testing.assert_close(ours.tokens, image.tokens, atol=1e-4, rtol=1e-4)
            for view, other in zip(ours.views, image.views, strict=True):
                torch.testing.assert_close(view, other, atol=1e-4, rtol=1e-4)


def test_a_rule_that_reads_the_question_is_given_the_models_own_prompt():
    case = CASES["digits-llava-1.5"]
    asked, rule = Asked(case, Scenes(2, "validation", 7)), PruningConfig(keep_ratio=0.2, score="cdpruner")
    first = asked.one_by_one[0]  # the first scene's first question, as in `two_prompts`
    (kept,) = library_rule(rule, None)([first])
    with torch.no_grad():
        outputs = asked.model(**asked.prompt, pruning=rule)
    assert torch.equal(kept.mask, outputs.keep_masks[0])


def standing(name, **rights):
    """A checkpoint of four scenes of two questions; `rule="2210"`: right answers."""
    rows = [{"rule": UNPRUNED, "wanted": 1.0, "right": "2222"}, {"rule": "no image", "wanted": 0.0, "right": "0000"}]
    rows += [{"rule": rule, "wanted": 0.05, "right": right} for rule, right in rights.items()]
    rows = [{"merge": "none", "kept": 0.05, "found": 0.5, "shows": {"digit": 1.0}, **row} for row in rows]
    about = {"name": name, "questions": ["a", "b"], "examples": 4, "split": "test", "kind": "image"}
    return Standing({**about, "caveats": [], "subject": "digit"}, rows)


def test_a_rule_that_one_checkpoint_cannot_run_does_not_shift_the_others_places():
    first = standing("one", oracle="2222", cosine="2220", random="1100", cls="2200")
    second = standing("two", oracle="2222", cosine="2220", random="2220")
    assert mean_places([first], [0.05]) == {"cosine": 1, "cls": 2, "random": 3}
    assert mean_places([first, second], [0.05]) == {"cosine": (1 + 1.5) / 2, "random": (2 + 1.5) / 2, "cls": 2}


def test_the_target_is_said_to_be_missed_where_it_is():
    needs = {"cosine": {"reads": ["unit_prototypes"]}, "random": {"reads": []}}
    near, far = (
        standing(name, oracle="2222", cosine=right, random="0000")
        for name, right in (("near", "2222"), ("far", "2220"))
    )
    assert "met on every checkpoint" in distance([near], needs)[0]
    text = distance([near, far], needs)
    assert "missed on far at 5%" in text[0] and "near at" not in text[0]
    assert "| far | 5% | cosine | -25.0 [" in text[1]
    assert first_gap(near) == (0, 0, 0) and near.share("cosine", 0.05) == 1


def first_gap(board):
    return board.gap("cosine", ORACLE, 0.05)


def test_an_interval_over_groups_weighs_each_alike():
    low, high = stratified_interval([np.zeros(10), np.array([0.0, 2.0] * 200)])
    assert 0.4 < low < 0.5 < high < 0.6


def test_the_command_writes_a_page_that_its_json_says(tmp_path, monkeypatch):
    monkeypatch.setattr(times, "LENGTHS", (40,))
    command.main(
        tmp_path,
        tmp_path / "known.jsonl",
        count=2,
        split="validation",
        rounds=1,
        only=["cosine", "cls_similarity_high"],
        checkpoint=["digits-qwen3-vl"],
        retention=[0.3, 0.05],
    )
    content = json.loads((tmp_path / "leaderboard.json").read_text())
    text = (tmp_path / "leaderboard.md").read_text()
    assert text == page(content)
    assert "--count 2 --split validation --times 1" in text and "--checkpoint digits-qwen3-vl" in text
    needs = content["needs"]
    assert needs["cosine"]["reads"] == ["unit_prototypes"] and needs["cosine"]["batches"] == {"digits-qwen3-vl": True}
    assert "has none" in needs["cls_similarity_high"]["refused"]["digits-qwen3-vl"]
    assert f"“{needs['cls_similarity_high']['refused']['digits-qwen3-vl']}”" in text
    rows = content["cases"][0]["rows"]
    assert {row["rule"] for row in rows} == {UNPRUNED, "no image", ORACLE, RESIZED, "cosine", "cls_similarity_high"}
    assert all("refused" in row for row in rows if row["rule"] == "cls_similarity_high")
    assert (tmp_path / "leaderboard.png").stat().st_size > 10_000
