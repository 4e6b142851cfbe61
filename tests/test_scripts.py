"""The quickstart as a user runs it, and the pictures it writes."""

import re

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import quickstart
from benchmark_prefill import transcription
from transformers_rbl.evaluation.plots import dim_dropped, kept_grids, plot_frames, plot_kept, plot_retentions
from transformers_rbl.models.layout import BASE, NEWLINE, PATCH, VisualLayout
from transformers_rbl.models.scorers import max_cosine


app = typer.Typer()
app.command()(quickstart.main)


@pytest.fixture(scope="module")
def files(family, pruned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    pruned.save_pretrained(folder / "saved")
    family.processor.save_pretrained(folder / "saved")
    pruned.codebook.save_pretrained(folder / "book")
    family.images(2)[1].save(folder / "photo.png")
    (folder / "broken.png").write_bytes(b"not a photo")
    return folder


def run(files, *arguments):
    arguments = [str(files / a[1:]) if a.startswith("@") else a for a in arguments]
    return CliRunner().invoke(app, [*arguments, "--repeats", "1", "--out", str(files / "out.png")])


@pytest.mark.parametrize("stock", [False, True])
def test_any_checkpoint_codebook_and_photo(family, files, stock):
    model = ["--model", str(family.folder), "--codebook", "@book"] if stock else ["--model", "@saved"]
    result = run(files, *model, "--image", "@photo.png", "--keep-ratio", "0.25")
    assert result.exit_code == 0, result.output
    assert "stock" in result.output and "pruned" in result.output and "keep_ratio 0.25" in result.output
    assert "test questions" not in result.output and "✓" not in result.output  # nobody knows the answers
    assert Image.open(files / "out.png").size[0] > 500


def test_the_digits_model_is_scored(files):
    result = run(files, "--digits", "--scored", "12")
    assert result.exit_code == 0, result.output
    assert "12 test questions" in result.output and "random" in result.output and "cosine" in result.output
    assert len(re.findall("[✓✗]", result.output)) == 4 and result.output.count("true") >= 2


def test_scenes_are_asked_in_order_and_things_named_in_any(monkeypatch):
    rows = [{"image": None, "question": f"{n}?", "answer": str(n)} for n in range(12)]
    monkeypatch.setattr(quickstart, "questions", lambda split, count: rows[: 6 * count])
    monkeypatch.setattr(quickstart, "assembled", lambda: "folder")
    show = quickstart.scenes(8)
    assert [question.text for question in show.shown] == ["0?", "6?"] and len(show.scored) == 8
    assert show.correct("a cat and a dog.", "a dog and a cat") and not show.correct("a cat", "a dog")


def test_without_the_downloads_of_the_scenes_the_digits_are_read(monkeypatch, capsys):
    def refuse(count):
        raise RuntimeError("No wheel here.\nMore words.")

    monkeypatch.setattr(quickstart, "scenes", refuse)
    show = quickstart.default_show(8, Console())
    assert show.model == quickstart.DIGITS and len(show.scored) == 8 and len(show.shown) == 2
    assert "No wheel here. Digits are read in its place." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--codebook", "@book"], "--codebook belongs to a model"),
        (["--model", "@saved", "--keep-ratio", "2"], "in (0, 1]"),
        (["--model", "@saved", "--keep-ratio", "0.2", "--threshold", "0.2"], "both were given"),
        (["--model", "@saved", "--image", "@missing.png"], "missing.png"),
        (["--model", "@saved", "--image", "@broken.png"], "cannot identify image file"),
        (["--model", "@nowhere"], "nowhere"),
        (["--model", "@saved", "--codebook", "@saved"], "is a model, and its codebook is inside it"),
    ],
)
def test_wrong_arguments_give_one_sentence(files, arguments, words):
    result = run(files, *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("quickstart: ")]
    assert len(errors) == 1 and words in errors[0]


def test_kept_tokens_are_mapped_back_to_the_image():
    kinds = torch.tensor([BASE] * 4 + [PATCH, PATCH, PATCH, NEWLINE] * 2)
    keep = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1]).bool()
    grids = kept_grids(keep, kinds)
    assert grids["base"].tolist() == [[True, False], [False, False]]
    assert grids["tiles"].tolist() == [[False, False, True], [True, False, False]]
    single = kept_grids(torch.tensor([1, 0, 0, 1, 1]).bool(), torch.tensor([PATCH, PATCH, PATCH, PATCH, NEWLINE]))
    assert single.keys() == {"base"} and single["base"].tolist() == [[True, False], [False, True]]


def test_dropped_cells_are_dimmed_where_they_lie():
    image = Image.new("RGB", (30, 20), (200, 100, 40))
    pixels = np.asarray(dim_dropped(image, np.array([[True, False, True], [False, True, True]])))
    assert pixels[5, 5].tolist() == [200, 100, 40] and pixels[15, 5].tolist() == [50, 25, 10]
    assert pixels[5, 15].tolist() == [50, 25, 10] and pixels[15, 15].tolist() == [200, 100, 40]


def test_the_transcription_that_scoring_is_timed_against_is_the_same_arithmetic():
    tokens, prototypes = torch.randn(30, 8), torch.randn(6, 8)
    expected = max_cosine(tokens, torch.nn.functional.normalize(prototypes, dim=-1))
    for tiles in (1, 5):
        torch.testing.assert_close(transcription(tokens, prototypes, tiles), expected)


def test_pictures_of_several_retentions_and_of_frames(tmp_path):
    photos = [Image.new("RGB", (40, 20), "white"), Image.new("RGB", (20, 20), "white")]
    kinds = [torch.tensor([BASE] * 4 + [*[PATCH] * 4, NEWLINE] * 2), torch.tensor([PATCH] * 4)]
    masks = [[torch.ones(len(kind), dtype=torch.bool) for kind in kinds], [kind == NEWLINE for kind in kinds]]
    plot_retentions(photos, masks, kinds, ["all", "none"], tmp_path / "photos.png")
    pixels = np.asarray(Image.open(tmp_path / "photos.png").convert("L"))
    bright = [(part > 200).mean() for part in np.array_split(pixels, 3, axis=1)]
    assert bright[0] == pytest.approx(bright[1], abs=0.05) and bright[2] < bright[1] - 0.2  # only the last is dimmed
    video = torch.tensor([True] * 4 + [False] * 4 + [True])
    plot_frames(photos, [video], ["some"], tmp_path / "frames.png")
    assert Image.open(tmp_path / "frames.png").size[1] > 400
    with pytest.raises(ValueError, match="3 frames"):
        plot_frames([*photos, photos[0]], [video], ["some"], tmp_path / "no.png")


def test_tiles_have_a_picture_of_their_own_where_there_are_some(tmp_path):
    photo, tiled = Image.new("RGB", (20, 20)), torch.tensor([BASE] * 4 + [*[PATCH] * 4, NEWLINE])
    plain = torch.full((4,), PATCH)
    widths = []
    for kinds in ([plain], [plain, tiled]):
        masks = [torch.ones(len(kind), dtype=torch.bool) for kind in kinds]
        plot_kept([photo] * len(kinds), masks, kinds, tmp_path / "kept.png")
        widths.append(Image.open(tmp_path / "kept.png").width)
    assert widths[1] == pytest.approx(1.5 * widths[0], rel=0.01)


def test_pictures_follow_a_layout_that_is_not_square(tmp_path):
    """Native resolution: rows and columns of the image, and of every temporal patch, which several frames share."""
    layout = VisualLayout.of_patches(6, grid=(2, 3))
    keep = torch.tensor([1, 0, 0, 0, 1, 1]).bool()
    assert kept_grids(keep, layout)["base"].tolist() == [[True, False, False], [False, True, True]]
    with pytest.raises(ValueError, match="5 tokens is not of an image of 6"):
        kept_grids(keep[:5], layout)
    photos = [Image.new("RGB", (60, 40), "white")] * 4
    video = VisualLayout.of_patches(12, frames=2, grid=(2, 3))
    plot_frames(photos, [torch.arange(12) < 6], ["first half"], tmp_path / "frames.png", video)
    pixels = np.asarray(Image.open(tmp_path / "frames.png").convert("L"))
    lower = np.array_split(pixels[len(pixels) // 2 :], 4, axis=1)
    bright = [(part > 200).mean() for part in lower]
    assert min(bright[:2]) > max(bright[2:]) + 0.2  # two frames to a temporal patch
    with pytest.raises(ValueError, match="3 frames cannot share the 2 temporal patches"):
        plot_frames(photos[:3], [torch.arange(12) < 6], ["no"], tmp_path / "no.png", video)
