"""`rbl build` as users run it: sources of images, resuming, processes, records, provenance, report; `rbl inspect`."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from conftest import make_family
from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.building.images import ImageSource
from transformers_rbl.building.recipe import Recipe, presets
from transformers_rbl.building.records import Records, check_probed_as
from transformers_rbl.cli import app


RECIPE = {
    "prompt": "Name it.",
    "targets": {"by": "stride", "stride": 2},
    "replacement": "mean",
    "thresholds": "quantile",
    "max_p1": 0.7,
    "max_divergence": 0.8,
    "image_clusters": 4,
    "max_cluster_size": None,
    "prototype_clusters": 3,
    "min_unique_images": 1,
}
FILES = ["README.md", "codebook.json", "codebook.safetensors", "provenance.csv", "recipe.yaml", "report.md"]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return make_family("llava_next", tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve crops of real photos, one of them in a folder below."""
    from sklearn.datasets import load_sample_images

    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    (folder / "below").mkdir()
    for number in range(12):
        photo = load_sample_images().images[number % 2]
        top, left = random.integers(0, 300, 2)
        name = f"below/{number:02}.png" if number == 11 else f"{number:02}.png"
        Image.fromarray(photo[top : top + 60, left : left + 60]).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def run(*arguments):
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, ["build", *map(str, arguments)])


@pytest.fixture(scope="module")
def built(family, photos, recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "book"
    result = run("--model", family.folder, "--images", photos, "--recipe", recipe, "--out", out, "--keep-ratio", 0.3)
    assert result.exit_code == 0, result.output
    return out, result.output


def same_bytes(one, other, names=FILES):
    return [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


def test_the_codebook_loads_into_the_pruned_model(family, built, one_image):
    model = family.rbl_class.from_pretrained(family.folder, codebook=built[0]).eval()
    assert model.pruning == PruningConfig(keep_ratio=0.3)
    output = model.generate(**one_image, max_new_tokens=4, return_dict_in_generate=True)
    assert 0 < output.keep_masks[0].sum() < len(output.keep_masks[0])


@pytest.fixture
def one_image(family):
    return family.inputs(["<s> <image> what?"], family.images(2)[1:])


def test_what_a_build_writes(built):
    out, printed = built
    assert sorted(path.name for path in out.iterdir()) == sorted([*FILES, "records", "report"])
    assert {p.name for p in (out / "report").iterdir()} == {
        f"{n}.png" for n in "retention measures clusters candidates".split()
    }
    book = RedundancyCodebook.from_pretrained(out)
    rows = list(csv.DictReader((out / "provenance.csv").open()))
    assert len(rows) == len(book.prototypes) > 3
    assert (
        f"{len(book.prototypes)} x 32" in printed and "11 probed, 0 from records, 1 held out, 0 unreadable" in printed
    )
    records = Records(out / "records")
    for number, row in enumerate(rows):
        index = int(row["image"].removesuffix(".png").removeprefix("below/"))
        probe = records.read(index)
        place = probe.positions.tolist().index(int(row["position"]))
        assert torch.equal(book.prototypes[number], probe.tokens[place].float())
        assert float(row["p1"]) == pytest.approx(float(probe.p1[place]), rel=1e-4)
        assert [row[f"word_{k}"] for k in (1, 2, 3)] == probe.words[place]
    assert sum(book.built_with["words"].values()) <= len(rows) and book.built_with["words"][rows[0]["word_1"]] >= 1
    assert book.built_with["images"]["held_out"] == 1 and book.built_with["recipe"]["max_p1"] == 0.7
    report = (out / "report.md").read_text()
    assert "1 images that were not probed" in report and "| retention | threshold |" in report
    assert Recipe.load(out / "recipe.yaml") == Recipe(**RECIPE)


def test_a_finished_build_again_changes_nothing(family, photos, recipe, built, tmp_path):
    out = tmp_path / "book"
    shutil.copytree(built[0], out)
    result = run("--model", family.folder, "--images", photos, "--recipe", recipe, "--out", out, "--keep-ratio", 0.3)
    assert "0 probed, 11 from records, 1 held out, 0 unreadable" in result.output
    assert not same_bytes(out, built[0])


@pytest.mark.parametrize("budget", [1, 300])
def test_batch_size_changes_no_selection(family, photos, recipe, built, tmp_path, budget):
    result = run(
        "--model",
        family.folder,
        "--images",
        photos,
        "--recipe",
        recipe,
        "--out",
        tmp_path / "book",
        "--max-tokens-per-batch",
        budget,
        "--keep-ratio",
        0.3,
    )
    assert result.exit_code == 0, result.output
    assert not same_bytes(tmp_path / "book", built[0], ["codebook.safetensors"])
    places = [
        [(r["image"], r["position"], r["cluster"]) for r in csv.DictReader((out / "provenance.csv").open())]
        for out in (tmp_path / "book", built[0])
    ]
    assert places[0] == places[1]


def test_a_device_map_and_low_precision(family, photos, recipe, built, tmp_path):
    arguments = ("--model", family.folder, "--images", photos, "--recipe", recipe, "--keep-ratio", 0.3)
    assert run(*arguments, "--out", tmp_path / "map", "--device-map", "cpu").exit_code == 0
    assert not same_bytes(tmp_path / "map", built[0])
    result = run(*arguments, "--out", tmp_path / "half", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert RedundancyCodebook.from_pretrained(tmp_path / "half").built_with["model"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no record", "another build"])
def test_a_damaged_record_is_detected_and_made_again(family, photos, recipe, built, tmp_path, damage):
    out = tmp_path / "book"
    shutil.copytree(built[0], out)
    record = out / "records" / "00000004.safetensors"
    content = bytearray(record.read_bytes())
    if damage == "truncated":
        record.write_bytes(content[:-40])
    elif damage == "flipped":
        content[-20] ^= 0xFF
        record.write_bytes(content)
    elif damage == "no record":
        shutil.copy(out / "records" / "run.json", record)
    else:
        known = Records(out / "records")
        other = Records(tmp_path / "other", {**known.run, "model": {}})
        other.begin()
        other.write(4, known.read(4))
        shutil.copy(other.path(4), record)
    assert Records(out / "records").read(4) is None
    result = run("--model", family.folder, "--images", photos, "--recipe", recipe, "--out", out, "--keep-ratio", 0.3)
    assert "1 probed, 10 from records, 1 held out" in result.output
    assert not same_bytes(out, built[0])


def test_a_changed_recipe_model_or_image_list_is_refused_and_named(family, photos, recipe, built, tmp_path):
    out = tmp_path / "book"
    shutil.copytree(built[0], out)
    arguments = {"--model": family.folder, "--images": photos, "--recipe": recipe, "--out": out}

    def refused(*extra, **changed):
        options = {**arguments, **{f"--{name}": value for name, value in changed.items()}}
        result = run(*(item for pair in options.items() for item in pair), *extra)
        errors = [line for line in result.stderr.splitlines() if line.startswith("rbl: ")]
        assert result.exit_code == 2 and len(errors) == 1, result.output
        return errors[0]

    probing = refused("--set", "prompt=What?")
    assert "recipe prompt was 'Name it.' and is 'What?'" in probing and "Give another output folder" in probing
    selection = refused("--set", "max_p1=0.5")
    assert "recipe max_p1 was 0.7 and is 0.5" in selection and "--from-records" in selection
    other = shutil.copytree(family.folder, tmp_path / "other")
    assert "model name was" in refused(model=other)
    fewer = tmp_path / "fewer"
    shutil.copytree(photos, fewer)
    (fewer / "00.png").unlink()
    assert "images count was 12 and is 11" in refused(images=fewer)
    assert "model dtype was 'float32' and is 'bfloat16'" in refused("--dtype", "bfloat16")


def test_other_weights_under_the_same_name_are_refused(family, photos, recipe, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(family.folder, model)
    arguments = ("--model", model, "--images", photos, "--recipe", recipe, "--out", tmp_path / "book")
    assert run(*arguments).exit_code == 0
    changed = family.stock()
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.01)
    changed.save_pretrained(model)
    assert "model weights_sha256 was" in run(*arguments).stderr


def test_selecting_again_needs_no_model(built, recipe, tmp_path):
    result = run("--from-records", built[0], "--out", tmp_path / "again", "--keep-ratio", 0.3)
    assert result.exit_code == 0, result.output
    assert not same_bytes(tmp_path / "again", built[0])
    result = run("--from-records", built[0] / "records", "--out", tmp_path / "fewer", "--set", "max_p1=0.3")
    assert result.exit_code == 0, result.output
    count = [len(RedundancyCodebook.from_pretrained(tmp_path / name).prototypes) for name in ("again", "fewer")]
    assert count[1] < count[0]
    refused = run("--from-records", built[0], "--out", tmp_path / "no", "--set", "replacement=pad")
    assert "probed with another replacement" in refused.stderr and not (tmp_path / "no").exists()
    empty = run("--from-records", built[0], "--out", tmp_path / "no", "--set", "min_unique_images=40")
    assert empty.exit_code == 2 and "No prototype is left" in empty.stderr and "lower min_unique_images" in empty.stderr


def test_records_are_selected_from_by_recipes_that_probe_alike(built):
    records, other = Records(built[0] / "records"), Recipe(**{**RECIPE, "max_p1": 0.1, "seed": 3, "image_clusters": 2})
    assert check_probed_as(records, Recipe(**RECIPE)) is None and check_probed_as(records, other) is None
    with pytest.raises(ValueError, match="probed with another prompt, replacement: only settings of the selection"):
        check_probed_as(records, Recipe(**{**RECIPE, "prompt": "What?", "replacement": "pad"}))


def test_unreadable_images_are_skipped_counted_and_listed(family, photos, recipe, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "03.png").write_bytes(b"not an image")
    cut = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(cut[: len(cut) // 2])
    result = run("--model", family.folder, "--images", folder, "--recipe", recipe, "--out", tmp_path / "book")
    assert result.exit_code == 0 and "2 unreadable" in result.output and "03.png" in result.output
    report = (tmp_path / "book" / "report.md").read_text()
    assert "could not be read: 2" in report and "- 05.png: " in report
    (folder / "03.png").write_bytes((folder / "04.png").read_bytes())  # mended, it is taken up
    result = run("--model", family.folder, "--images", folder, "--recipe", recipe, "--out", tmp_path / "book")
    assert "1 probed, 9 from records, 1 held out, 1 unreadable" in result.output


def test_a_folder_of_broken_images_says_so_and_another_one_may_follow(family, photos, recipe, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in ("a.png", "b.png"):
        (folder / path).write_bytes(b"not an image")
    arguments = ("--model", family.folder, "--images", folder, "--recipe", recipe, "--out", tmp_path / "book")
    result = run(*arguments)
    assert result.exit_code == 2 and "None of 2 images could be read (the first, a.png: " in result.stderr
    assert "run the same command again" in result.stderr and not (tmp_path / "book" / "codebook.json").exists()
    shutil.rmtree(folder)
    shutil.copytree(photos, folder)  # other names
    result = run(*arguments)
    assert result.exit_code == 0 and "11 probed, 0 from records" in result.output, result.output


def test_images_from_a_list_and_from_a_dataset(family, photos, recipe, built, tmp_path):
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    (photos / "list.txt").write_text("\n".join(names) + "\n\n")
    listed = ImageSource(photos / "list.txt")
    assert [name for _, name, _ in listed.items(range(len(listed)))] == names
    from datasets import Dataset
    from datasets import Image as ImageFeature

    data = Dataset.from_dict({"picture": [str(photos / name) for name in names]}).cast_column("picture", ImageFeature())
    data.save_to_disk(tmp_path / "data")
    data.to_parquet(tmp_path / "parquet" / "part.parquet")
    arguments = ("--model", family.folder, "--recipe", recipe, "--image-column", "picture", "--keep-ratio", 0.3)
    for number, images in enumerate([photos / "list.txt", tmp_path / "data", tmp_path / "parquet"]):
        out = tmp_path / f"book {number}"
        result = run(*arguments, "--images", images, "--out", out)
        assert result.exit_code == 0, result.output
        assert not same_bytes(out, built[0], ["codebook.safetensors"])
    wrong = run(*arguments[:-4], "--images", tmp_path / "data", "--out", tmp_path / "no")
    assert "has no column image; it has picture" in wrong.stderr


def test_one_image_and_a_file_that_is_neither(photos, tmp_path):
    source = ImageSource(photos / "00.png")
    assert [name for _, name, image in source.items([0])] == ["00.png"] and len(source) == 1
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="neither an image nor a list"):
        ImageSource(tmp_path / "model.bin")


def test_a_streamed_dataset_needs_a_number(photos, tmp_path):
    from datasets import Dataset
    from datasets import Image as ImageFeature

    names = sorted(str(path) for path in photos.glob("*.png"))
    data = Dataset.from_dict({"image": names}).cast_column("image", ImageFeature())
    data.to_parquet(tmp_path / "part.parquet")
    with pytest.raises(ValueError, match="no known length"):
        ImageSource(tmp_path, streaming=True)
    source = ImageSource(tmp_path, streaming=True, limit=7)
    assert [index for index, _, image in source.items([1, 4, 6])] == [1, 4, 6] and len(source) == 7
    assert all(image.mode == "RGB" for _, _, image in source.items([0, 2]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"--model": None}, "Give --model and --images"),
        ({"--images": None}, "--model needs --images and --recipe"),
        ({"--images": "/no/such/folder"}, "is no file, folder or dataset"),
        ({"--recipe": "nothing"}, "neither a recipe file nor a preset (digits, llama3-llava-next-8b, llava-1.5-7b"),
        ({"--recipe": "llava-1.5-7b"}, "probes rank 576, but an image has 16 tokens"),
        ({"--set": "colour=red"}, "Unknown recipe setting(s) colour"),
        ({"--set": "max_p1"}, "--set takes NAME=VALUE"),
        ({"--set": "max_p1=-1"}, "max_p1 must be a number of at least 0"),
        ({"--dtype": "int8"}, "--dtype is auto"),
        ({"--device": "bananas"}, "--device bananas cannot be had: this machine has cpu"),
        ({"--keep-ratio": 7}, "in (0, 1]"),
        ({"--set": "pad_token_id=9999", "--recipe": None}, "--recipe besides"),
        ({"--set": "pad_token_id=9999"}, "beyond this model's vocabulary"),
    ],
)
def test_wrong_input_gets_one_sentence(family, photos, recipe, tmp_path, options, words):
    given = {"--model": family.folder, "--images": photos, "--recipe": recipe, "--out": tmp_path / "out", **options}
    result = run(*(item for name, value in given.items() if value is not None for item in (name, value)))
    assert result.exit_code == 2 and words in result.stderr, result.output
    assert (
        "Traceback" not in result.stderr and len([x for x in result.stderr.splitlines() if x.startswith("rbl: ")]) == 1
    )


def test_a_folder_without_images_and_one_that_cannot_be_written(family, photos, recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = ("--model", family.folder, "--recipe", recipe)
    assert "has no images" in run(*arguments, "--images", tmp_path / "empty", "--out", tmp_path / "out").stderr
    (tmp_path / "file").write_text("in the way")
    result = run(*arguments, "--images", photos, "--out", tmp_path / "file")
    assert result.exit_code == 2 and "file" in result.stderr


def test_a_full_disk_ends_with_one_sentence_and_keeps_what_is_done(
    family, photos, recipe, built, tmp_path, monkeypatch
):
    from transformers_rbl.building import records as module

    write_whole, count = module.write_whole, [0]

    def full(path, content):
        count[0] += 1
        if count[0] == 5:
            raise OSError(28, "No space left on device", str(path))
        write_whole(path, content)

    monkeypatch.setattr(module, "write_whole", full)
    arguments = (
        "--model",
        family.folder,
        "--images",
        photos,
        "--recipe",
        recipe,
        "--out",
        tmp_path,
        "--keep-ratio",
        0.3,
    )
    result = run(*arguments)
    assert result.exit_code == 2 and "No space left on device" in result.stderr
    result = run(*arguments)
    assert "8 probed, 3 from records" in result.output
    assert not same_bytes(tmp_path, built[0])


def command(*arguments):
    return [sys.executable, "-m", "transformers_rbl.cli", "build", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def test_kill_9_in_the_middle_then_resume(family, photos, recipe, tmp_path):
    """The same bytes as a run that nobody killed."""

    def arguments(out):
        probing = (
            "--set",
            "targets={by: all}",
            "--max-tokens-per-batch",
            1,
        )  # takes its time, so that there is a middle
        return command("--model", family.folder, "--images", photos, "--recipe", recipe, "--out", out, *probing)

    subprocess.run(arguments(tmp_path / "whole"), check=True, env=ENVIRONMENT, capture_output=True)
    process = subprocess.Popen(arguments(tmp_path / "killed"), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    records = tmp_path / "killed" / "records"
    deadline = time.time() + 120
    while len(list(records.glob("0*.safetensors"))) < 4 and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(records.glob("0*.safetensors")))
    held_out = (records / f"{6:08}.safetensors").exists()
    assert 4 <= done < 12 and not (tmp_path / "killed" / "codebook.safetensors").exists()
    result = subprocess.run(arguments(tmp_path / "killed"), check=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert f"{done - held_out} from records" in result.stdout
    assert not same_bytes(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_give_the_same_bytes_as_one(family, photos, recipe, tmp_path, processes):
    """accelerate over gloo; the same budget and one thread each."""
    arguments = ["--model", family.folder, "--images", photos, "--recipe", recipe]
    subprocess.run(command(*arguments, "--out", tmp_path / "one"), check=True, env=ENVIRONMENT, capture_output=True)
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        processes,
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        0,
        "-m",
        "transformers_rbl.cli",
        "build",
        *arguments,
        "--out",
        tmp_path / "many",
    ]
    result = subprocess.run(list(map(str, launch)), env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "11 probed, 0 from records" in result.stdout
    assert not same_bytes(tmp_path / "many", tmp_path / "one")


def test_builds_of_every_family(photos, recipe, tmp_path):
    for name in ("llava", "llava_onevision"):
        other = make_family(name, tmp_path / name)
        out = tmp_path / f"{name}-book"
        result = run("--model", other.folder, "--images", photos, "--recipe", recipe, "--out", out)
        assert result.exit_code == 0, result.output
        model = other.rbl_class.from_pretrained(other.folder, codebook=out, keep_ratio=0.3)
        assert len(model.codebook.prototypes) > 0


def test_a_pruned_checkpoint_is_probed_without_pruning(family, photos, recipe, built, tmp_path):
    family.pruned().save_pretrained(tmp_path / "pruned")
    family.processor.save_pretrained(tmp_path / "pruned")
    arguments = ("--model", tmp_path / "pruned", "--images", photos, "--recipe", recipe, "--out", tmp_path / "book")
    assert run(*arguments, "--keep-ratio", 0.3).exit_code == 0
    assert not same_bytes(tmp_path / "book", built[0], ["codebook.safetensors"])


def test_inspect(family, photos, built, tmp_path):
    sheet = tmp_path / "sheet.png"
    result = CliRunner(env={"COLUMNS": "300"}).invoke(
        app, ["inspect", str(built[0]), "--images", str(photos), "--sheet", str(sheet)]
    )
    assert result.exit_code == 0, result.output
    for words in (
        "prototypes",
        "repeated rows",
        "norms",
        "mean cosine",
        "keep_ratio 0.3",
        "provenance, 10 of",
        "0 images not found",
    ):
        assert words in result.output, words
    assert Image.open(sheet).size[0] > 300
    bare = tmp_path / "bare"
    RedundancyCodebook(torch.randn(1, 4)).save_pretrained(bare)
    result = CliRunner().invoke(app, ["inspect", str(bare)])
    assert result.exit_code == 0 and "No provenance table" in result.output and "not recorded" in result.output
    result = CliRunner().invoke(app, ["inspect", str(bare), "--images", str(photos)])
    assert result.exit_code == 2 and "needs the provenance table" in result.stderr
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "missing")])
    assert result.exit_code == 2 and "no folder with a codebook" in result.stderr


def test_patches_are_cut_where_the_token_lies():
    from transformers_rbl.building.inspection import patch

    grid = np.kron(np.arange(16).reshape(4, 4), np.ones((10, 10))).astype(np.uint8)
    image = Image.fromarray(grid)
    assert set(np.unique(np.asarray(patch(image, 6, 4, centre=False, around=0)))) == {6}
    wide = Image.fromarray(np.pad(grid, ((0, 0), (20, 20)), constant_values=99))
    assert set(np.unique(np.asarray(patch(wide, 9, 4, centre=True, around=0)))) == {9}


def test_presets_are_the_folders_with_a_recipe():
    """The wheel ships each of them, and the documentation names it."""
    root = Path(__file__).parents[1]
    included = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(included["force-include"]) == {f"codebooks/{name}" for name in presets()}
    assert sorted(presets()) == sorted(path.parent.name for path in root.glob("codebooks/*/recipe.yaml"))
    assert all(Recipe.load(name) == Recipe.load(path) for name, path in presets().items())
    text = (root / "docs" / "building.md").read_text()
    assert all(f"`{name}`" in text for name in presets())


def test_presets_hold_the_shipped_constants():
    first, second, third = (
        Recipe.load(n) for n in ("llava-1.5-7b", "llama3-llava-next-8b", "llava-onevision-qwen2-7b-ov")
    )
    for recipe in (first, second, third):
        assert (recipe.local_weight, recipe.global_weight, recipe.image_clusters) == (1, 16, 8)
        assert (recipe.top_k_p1, recipe.top_k_divergence, recipe.nearest_neighbours) == (50, 10, 5)
        assert (recipe.replacement, recipe.divergence, recipe.thresholds) == ("pad", "upstream", "absolute")
        assert recipe.prompt.startswith("What does this image show? You must provide a single word")
    assert [r.num_images for r in (first, second, third)] == [500, 100, 1200]
    assert [r.max_p1 for r in (first, second, third)] == [0.15, 0.1, 0.08]
    assert [r.max_divergence for r in (first, second, third)] == [2e-3, 2e-3, 1.8e-3]
    assert [(r.max_cluster_size, r.prototype_clusters, r.min_unique_images) for r in (first, second, third)] == [
        (8, 64, 64),
        (8, 64, 64),
        (3, 24, 16),
    ]
    assert [r.pad_token_id for r in (first, second, third)] == [0, 0, 151643]
    ranks = [rank for low, high in first.targets["ranks"] for rank in range(low, high + 1)]
    assert len(ranks) == 96 == len(third.targets["positions"]) and ranks[-1] == 576
    assert first.target_positions(576, torch.linspace(1, 0, 576)).tolist() == [rank - 1 for rank in ranks]
    cards = Path(__file__).parents[1] / "codebooks"
    from huggingface_hub import ModelCard

    for name in ("llava-1.5-7b", "llama3-llava-next-8b", "llava-onevision-qwen2-7b-ov"):
        card = ModelCard.load(cards / name / "README.md")
        assert card.data.base_model.startswith("llava-hf/") and card.data.license == "apache-2.0"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": {"by": "luck"}}, "targets must say by"),
        ({"targets": {"by": "stride"}}, "take stride besides"),
        ({"targets": {"by": "stride", "stride": 0}}, "stride must be an integer"),
        ({"targets": {"by": "positions", "positions": [1, 1]}}, "name a token twice"),
        ({"targets": {"by": "cls_rank", "ranks": [[3, 1]]}}, "pairs"),
        ({"replacement": "zero"}, "replacement must be one of"),
        ({"thresholds": "quantile", "max_p1": 2}, "max_p1 is a quantile"),
        ({"prototype_clusters": 0}, "prototype_clusters must be an integer"),
        ({"prompt": " "}, "prompt must be a question"),
    ],
)
def test_bad_recipes_get_a_sentence(changes, words, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changes))
    with pytest.raises(ValueError, match=words):
        Recipe.load(path)
    path.write_text("- a list")
    with pytest.raises(ValueError, match="is no recipe: A recipe is a mapping"):
        Recipe.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is no recipe"):
        Recipe.load(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from transformers_rbl.building import records as module

    module.write_whole(tmp_path / "file", b"first")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file'"):
        module.write_whole(tmp_path / "file", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"first"


def test_records_that_other_processes_wrote_elsewhere_are_missed(built, tmp_path):
    from transformers_rbl.building.build import Probed, build_codebook

    shutil.copytree(built[0] / "records", tmp_path / "records")
    (tmp_path / "records" / "00000004.safetensors").unlink()
    records = Records(tmp_path / "records")
    with pytest.raises(OSError, match="lacks the records of 1 images: all processes must write"):
        build_codebook(records, Recipe(**RECIPE), tmp_path / "out", probed=Probed())
    build_codebook(records, Recipe(**RECIPE), tmp_path / "out", probed=Probed(skipped=[("04.png", "broken")]))


def test_records_of_another_version_do_not_open(tmp_path):
    with pytest.raises(OSError, match="holds no probe records"):
        Records(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Records(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"images": {"count": 2}}))
    assert Records(tmp_path).read(0) is None


def test_a_codebook_does_not_tell_where_the_model_lay(built, family):
    folder, _ = built
    for name in ("codebook.json", "README.md"):
        assert str(family.folder) not in (folder / name).read_text()
    assert Path(family.folder).name in (folder / "codebook.json").read_text()
