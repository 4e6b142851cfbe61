"""The trained testbed: what its splits keep apart, that training sees what processors give, and that it resumes."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from testbeds import assembling, comparison, report, trainer
from testbeds.answering import answer
from testbeds.commands import app as commands_app
from testbeds.digits import pictures
from testbeds.digits.model import stock_config, stock_model, stock_processor, word_tokenizer
from testbeds.digits.placing import BACKDROP
from testbeds.digits.questions import draw_example, examples
from testbeds.digits.sizes import KINDS, draw_size, step_of
from testbeds.digits.splits import belongs, glyph_indices, photo_columns
from testbeds.digits.training import DigitsTrainer
from testbeds.files import write_questions
from testbeds.testbed import SPLITS, Stage
from testbeds.tokens import encode, subject_shares, token_centres, visual_inputs, window_mask
from transformers_rbl import RedundancyCodebook, rbl_class
from transformers_rbl.cli import app
from transformers_rbl.evaluation.evaluate import prompt_text
from transformers_rbl.evaluation.metrics import bootstrap_interval


EVERY = [(family, kind) for family, kinds in KINDS.items() for kind in kinds]


def test_splits_share_no_glyph_no_photo_column_and_no_composition():
    images = load_digits().images
    pictures = {split: set() for split in SPLITS}
    for split in SPLITS:
        for digit, indices in glyph_indices(split).items():
            assert len(indices) >= 8, (split, digit)
            pictures[split] |= {images[index].tobytes() for index in indices}
    assert sum(map(len, pictures.values())) == len({image.tobytes() for image in images})
    assert not any(a & b for a, b in itertools.combinations(pictures.values(), 2))

    columns = [photo_columns(split) for split in SPLITS]
    assert columns[0][0] == 0 and columns[-1][1] == 1
    assert all(a[1] == b[0] for a, b in itertools.pairwise(columns))

    sequences = [digits for count in (2, 3) for digits in itertools.product(range(10), repeat=count)]
    owners = [[split for split in SPLITS if belongs(digits, split)] for digits in sequences]
    assert all(len(owner) == 1 for owner in owners)
    assert {split: owners.count([split]) > 50 for split in SPLITS} == dict.fromkeys(SPLITS, True)


@pytest.mark.parametrize("family, kind", EVERY)
@pytest.mark.parametrize("split", SPLITS)
def test_examples_stay_in_their_split_and_among_decoys(family, kind, split):
    drawn = list(examples(family, kind, split, 20, 5))
    again = list(examples(family, kind, split, 20, 5))
    salient = []
    for example, same in zip(drawn, again, strict=True):
        assert belongs(example.digits, split)
        assert all(np.array_equal(a, b) for a, b in zip(example.images, same.images))
        salient += [(label > BACKDROP).mean() for label in example.labels]
        shown = {int(label) for labels in example.labels for label in labels.flatten() if label < 10}
        assert shown == set(example.digits)
    assert np.mean(salient) >= 0.30
    others = [example for other in set(SPLITS) - {split} for example in examples(family, kind, other, 20, 5)]
    assert not {e.digits for e in drawn if len(e.digits) > 1} & {e.digits for e in others}


@pytest.mark.parametrize("family, kind", EVERY)
def test_training_sees_what_the_processor_gives(family, kind):
    model = stock_model(family).eval()
    processor = stock_processor(model.config)
    example = next(iter(examples(family, kind, "train", 1, 3)))
    fast = visual_inputs(model.config, [example])
    text = processor.video_token if example.video else processor.image_token * len(example.images)
    given = {"videos": [np.stack(example.images)]} if example.video else {"images": [example.pictures()]}
    stock = processor(text=[text], return_tensors="pt", **given)
    for name, value in fast.items():
        expected = torch.as_tensor(stock[name])
        # The base image is scaled by another library: one level of 255 apart at most.
        assert torch.allclose(torch.as_tensor(value).float(), expected.float(), atol=0.016), name
    count = sum(map(len, encode(model, [example])[0]))
    id_ = processor.tokenizer.convert_tokens_to_ids(processor.video_token if example.video else processor.image_token)
    assert count == len(token_centres(model.config, example)) == int((stock.input_ids == id_).sum())


@pytest.mark.parametrize("family, kind", EVERY)
def test_a_window_holds_all_digits(family, kind):
    random, thinned = np.random.default_rng(0), 0
    for _ in range(20):
        example = draw_example(random, kind, "train", draw_size(random, family), window=True, step=step_of(family))
        top, left, height, width = example.window
        for labels in example.labels:
            outside = labels.copy()
            outside[top : top + height, left : left + width] = BACKDROP
            assert not (outside < 10).any()
        centres, digit = token_centres(stock_config(family), example), subject_shares(stock_config(family), example)
        assert len(centres) == len(digit) and (digit > 0).any()
        drawn = [window_mask(random, centres, digit, example) for _ in range(12)]
        whole, needed = torch.stack(drawn).any(0), (digit > 0) | centres.isnan().any(1)
        assert whole[digit == 1].all() and all(torch.equal(mask[needed], whole[needed]) for mask in drawn)
        assert whole.sum() >= height * width / 4 and (height * width < labels.size) == (not whole.all())
        thinned += sum(bool((mask != whole).any()) for mask in drawn)
    assert 20 < thinned < 20 * 12 / 2 + 20


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_every_word_of_a_question_is_known(family):
    tokenizer = word_tokenizer(family)
    for kind in ("image", "images", "video"):
        for number in range(20):
            example = draw_example(np.random.default_rng(number), kind, "train", (168, 168))
            for _, question, reply in example.questions + example.lessons:
                assert tokenizer.unk_token_id not in tokenizer(f"{question} {reply}").input_ids
    assert tokenizer.decode(tokenizer("3 7").input_ids) == "3 7"


def test_prompts_say_where_images_stand():
    image, images, video = (next(examples(family, kind, "train", 1, 0)) for family, kind in EVERY[1:4])
    assert image.prompt("why?") == "<image> why?" and video.prompt("why?") == "<video> why?"
    assert images.prompt("why?") == "image 1: <image> image 2: <image> image 3: <image> why?"


@pytest.mark.parametrize("family, kind", EVERY)
def test_questions_side_by_side_are_answered_as_each_alone_in_the_chat_template(family, kind):
    torch.manual_seed(0)
    model = stock_model(family).eval()
    processor = stock_processor(model.config)
    words = processor.tokenizer
    example = next(examples(family, kind, "train", 1, 3))
    if example.video:
        shown, count, modality = {"videos": [np.stack(example.images)]}, 1, "video"
    else:
        shown, count, modality = {"images": [example.pictures()]}, len(example.images), "image"
    losses, right = [], []
    with torch.no_grad():
        for _, question, reply in example.questions:
            prompt = prompt_text(processor, example.prompt(question), count, modality)
            inputs = processor(text=[prompt], return_tensors="pt", **shown)
            asked = inputs.input_ids
            expected = torch.tensor([*words(reply).input_ids, words.eos_token_id])
            ids = torch.cat([asked, expected[None, :-1]], 1)
            along = visual_inputs(model.config, [example])
            if "mm_token_type_ids" in inputs:
                along["mm_token_type_ids"] = F.pad(inputs.mm_token_type_ids, (0, len(expected) - 1))
            logits = model(input_ids=ids, **along).logits[0, asked.shape[1] - 1 :]
            losses.append(F.cross_entropy(logits, expected, reduction="none"))
            right.append(bool((logits.argmax(-1) == expected).all()))
        loss, _, rights = answer(model, words, encode(model, [example]), [example])
    torch.testing.assert_close(loss, torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)
    assert rights[0].tolist() == right


def test_pruned_tokens_are_asked_about_as_the_library_prunes_them(tmp_path):
    """m-RoPE and deepstack: kept tokens keep their places and their views, and the text stays where it was."""
    torch.manual_seed(0)
    model = stock_model("qwen3_vl").eval()
    processor, words = stock_processor(model.config), stock_processor(model.config).tokenizer
    example = next(examples("qwen3_vl", "image", "train", 1, 3))
    with torch.no_grad():
        for weights in model.model.visual.merger.parameters():
            weights.normal_(std=0.2)  # so that visual tokens matter to the answer
        image = encode(model, [example])[0][0]
        model.save_pretrained(tmp_path)
        book = RedundancyCodebook(image.tokens[::3])
        pruned = rbl_class(tmp_path).from_pretrained(tmp_path, codebook=book, keep_ratio=0.4).eval()
        _, question, reply = example.questions[0]
        text = f"{prompt_text(processor, question, 1)}{reply}"
        inputs = processor(text=[text], images=example.pictures(), return_tensors="pt")
        outputs = pruned(**inputs)
        expected = torch.tensor([*words(reply).input_ids, words.eos_token_id])
        theirs = F.cross_entropy(outputs.logits[0, -len(expected) :], expected)
        example.questions = example.questions[:1]
        kept = image.kept(outputs.keep_masks[0])
        assert 0 < len(kept) < len(image)
        ours, moved = (answer(model, words, [[shown]], [example])[0] for shown in (kept, kept.renumbered()))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert abs(moved - ours) > 1e-4


def test_the_same_digit_is_asked_about_as_often_as_not():
    for split in SPLITS:
        replies = [
            reply.split()
            for example in examples("llava_onevision", "images", split, 60, 0)
            for kind, _, reply in example.questions
            if kind == "same"
        ]
        assert all((verdict == "yes") == (first == second) for first, second, verdict in replies)
        assert len(replies) == 60 and 18 <= sum(reply[-1] == "yes" for reply in replies) <= 42


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl"])
def test_training_is_deterministic_and_resumes_where_it_was_killed(family, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_EVERY", 2)
    stages = (Stage("tower", 3, 1e-3, 4), Stage("answer", 5, 1e-3, 4), Stage("window", 1, 1e-3, 4))
    whole = DigitsTrainer(family, 0, tmp_path / "whole", stages)
    whole.run()

    class Killed(Exception):
        pass

    calls = []

    def dies(random, stage, early):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return DigitsTrainer.answer_loss(killed, random, stage, early)

    killed = DigitsTrainer(family, 0, tmp_path / "killed", stages)
    killed.answer_loss = dies
    with pytest.raises(Killed):
        killed.run()
    resumed = DigitsTrainer(family, 0, tmp_path / "killed", stages)
    resumed.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, value.bfloat16().float()), "a stage goes on from what the last one saved"
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    other = DigitsTrainer(family, 1, tmp_path / "other", ())
    assert not torch.equal(other.model.lm_head.weight, whole.model.lm_head.weight)
    assert not (tmp_path / "killed" / "state.pt").exists()
    assert (tmp_path / "killed" / "answer" / "model.safetensors").exists()


ROOT = Path(__file__).parents[1]


def test_every_command_that_is_written_down_exists():
    written = [ROOT / "Makefile", ROOT / ".ci" / "run", *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    written += [*ROOT.glob("codebooks/*/*.md"), *ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/testbeds/**/*.*")]
    commands, seen = typer.main.get_command(commands_app).commands, set()
    for path in written:
        if path.suffix not in (".pyc", ".png"):
            for name, rest in re.findall(r"scripts/testbeds ([a-z][a-z-]*)(.*)", path.read_text()):
                parameters = commands[name].params
                known = {option for each in parameters for option in (*each.opts, *each.secondary_opts)}
                assert set(re.findall(r"--[a-z-]+", rest)) <= known, (path, rest)
                seen.add(name)
    assert seen == set(commands)


def run_rbl(*command):
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output


def build_book(checkpoint, folder, *options):
    source = ["--model", checkpoint, "--images", checkpoint / "images", "--recipe", "digits", "--dtype", "float32"]
    run_rbl("build", *source, "--out", folder, *options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, name, results",
    [("llava_next", "digits-llava-next", "next-seed0"), ("qwen3_vl", "digits-qwen3-vl", "qwen3-vl-seed0")],
)
def test_the_whole_chain_from_images_to_the_committed_accuracy(family, name, results, tmp_path):
    """`rbl build` on the committed checkpoint and its own images, then `rbl evaluate` by stock processing and
    `generate`: as accurate as the results page says of the same questions, and better than chance selection."""
    checkpoint = ROOT / "codebooks" / name
    committed = json.loads((ROOT / "docs" / "results" / "testbed" / f"{results}.json").read_text())
    rows = {(row["rule"], row["wanted"]): row["right"] for row in committed["results"]}
    about, count = committed["about"], 50

    build_book(checkpoint, tmp_path / "book", "--keep-ratio", 0.15)
    write_questions(tmp_path / "asked", family, count, about["split"], about["seed"])
    questions = tmp_path / "asked" / "questions.jsonl"
    asked = ["--data", questions, "--metric", "exact", "--score", "cosine", "--score", "random", "--keep-ratio", 0.15]
    book = ["--codebook", tmp_path / "book", "--dtype", "float32"]
    run_rbl("evaluate", "--model", checkpoint, *book, *asked, "--out", tmp_path / "evaluation")
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())["results"]
    accuracies = [100 * float(np.mean(result["correct"]["exact"])) for result in results]
    for rule, accuracy in zip((("unpruned", 1.0), ("codebook: codebook", 0.15)), accuracies):
        shares = np.array([[int(bit) for bit in bits] for bits in rows[rule][:count]]).mean(1)
        low, high = bootstrap_interval(100 * shares)
        assert low <= accuracy <= high, rule
    assert accuracies[1] > accuracies[2] + 30


@pytest.mark.slow
def test_the_scripts_behind_the_results_page(tmp_path):
    """Rules compared, tables and a plot of them, pictures, and a checkpoint put together, from the committed ones."""
    checkpoint = ROOT / "codebooks" / "digits-llava-next"
    build_book(checkpoint, tmp_path / "book")
    comparison.main(
        checkpoint, tmp_path / "found.json", codebook=[f"codebook={tmp_path / 'book'}"], count=12, threshold=[0.9]
    )
    abouts, rules = report.read([tmp_path / "found.json"])
    text = report.tables(abouts, rules, "digit")
    assert f"prototypes: {abouts[0]['prototypes']['codebook']}." in text and "| oracle |" in text
    assert rules[("unpruned", 1.0)].examples.mean() > rules[("random", 0.1)].examples.mean() + 0.3
    report.main([tmp_path / "found.json"], tmp_path / "found.png", "found")
    pictures.main(tmp_path / "pictures")
    for path in (
        tmp_path / "found.png",
        *(tmp_path / "pictures" / f"{name}.png" for name in ("kept", "sizes", "frames", "why")),
    ):
        assert np.asarray(Image.open(path)).std() > 10
    assembling.main(checkpoint, tmp_path / "book", checkpoint / "images", tmp_path / "made")
    card = (tmp_path / "made" / "README.md").read_text()
    assert "- `<s>USER: <image> which digits are there? ASSISTANT:` → `" in card
    assert rbl_class(tmp_path / "made").from_pretrained(tmp_path / "made").pruning.keep_ratio == 0.15
