"""The demo: what it asks, what a click finds, what it says of bad input, and the page in a real browser.

RBL_SCREENSHOT=docs/demo.png pytest tests/test_demo.py -k browser    # writes a picture of the page, of the default
checkpoint if it is there; RBL_IMAGES=folder for other images than the test's.
"""

import csv
import json
import os
import re
import runpy
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tiny_checkpoint
from conftest import make_family, visual
from testbeds.digits.questions import examples
from transformers_rbl import PruningConfig, RedundancyCodebook, demo
from transformers_rbl.building.build import PROVENANCE_NAME
from transformers_rbl.cli import app
from transformers_rbl.demo import RATIO, THRESHOLD, ask, explain_click, load_demo, open_photo, picture
from transformers_rbl.models.layout import BASE, NEWLINE, PATCH


OFF = PruningConfig(enabled=False)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
COLUMNS = ("prototype", "image", "position", "word_1", "word_2", "word_3")


def write_codebook(folder, model, processor, image, name, positions):
    """A codebook of an image's own base tokens, with a provenance table: those patches have cosine 1."""
    inputs = processor.image_processor(image, return_tensors="pt")
    with torch.no_grad():
        tokens = model.get_image_features(**inputs, pruning=OFF, return_dict=True).pooler_output[0][positions]
    vision = model.config.vision_config
    crop = "centre" if model.config.model_type.startswith("llava_rbl") else "none"
    built = {"model": {"grid": vision.image_size // vision.patch_size, "crop": crop}}
    RedundancyCodebook(tokens, recommended_keep_ratio=0.3, built_with=built).save_pretrained(folder)
    with open(folder / PROVENANCE_NAME, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows([row, name, position, "sky", "wall", f"w{row}"] for row, position in enumerate(positions))


@pytest.fixture(scope="module")
def files(family, pruned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "images" / "deep").mkdir(parents=True)
    for number, image in enumerate(family.images(4)):
        image.save(folder / "images" / "deep" / f"{number}.png")
    # The table knows the image by its bare name, the folder has it one level down.
    wide = Image.open(folder / "images" / "deep" / "2.png")
    write_codebook(folder / "book", pruned, family.processor, wide, "2.png", [2, 7, 9])
    return folder


@pytest.fixture(scope="module")
def stand(family, files):
    return load_demo(family.folder, files / "book", files / "images")


@pytest.fixture(scope="module")
def wide(files):
    return open_photo(files / "images" / "deep" / "2.png")


@pytest.fixture(scope="module")
def answer(stand, wide):
    return ask(stand, wide, "what?", RATIO, 0.25, repeats=1, max_new_tokens=1)


def positions_by_hand(kinds):
    """Token of every cell, walking along the sequence."""
    base, tiles = BASE in kinds, [[]]
    grids = {"base": [i for i, kind in enumerate(kinds) if kind == (BASE if base else PATCH)]}
    for position, kind in enumerate(kinds):
        if kind == NEWLINE:
            tiles.append([])
        elif kind == PATCH and base:
            tiles[-1].append(position)
    side = round(len(grids["base"]) ** 0.5)
    grids["base"] = [grids["base"][i : i + side] for i in range(0, side**2, side)]
    if base:
        grids["tiles"] = [row for row in tiles if row]
    return grids


def test_a_click_finds_the_token_under_it(family, stand, wide, answer):
    inputs = family.inputs(["<image>"], [wide])
    expected = positions_by_hand(stand.model.model.token_kinds(**inputs)[0].tolist())
    assert answer.grids.keys() == expected.keys() == ({"base", "tiles"} if family.has_tiles else {"base"})
    whole = stand.model.get_image_features(**visual(inputs), pruning=OFF, return_dict=True).pooler_output[0]
    scores = stand.model.codebook.score(whole)
    for view, rows in expected.items():
        width, height = picture(answer, view).size
        for row, cells in enumerate(rows):
            for column, token in enumerate(cells):
                x, y = (column + 0.5) * width / len(cells), (row + 0.5) * height / len(rows)
                click = explain_click(stand, answer, view, x, y)
                assert click.token == token
                verdict = "Kept" if answer.keep_mask[token] else "Dropped"
                assert click.text.startswith(f"{verdict}: row {row + 1}, column {column + 1} of the")
                assert f"cosine {scores[token]:.3f} with prototype" in click.text
    for outside, token in (((-5, -5), expected["base"][0][0]), ((9999, 9999), expected["base"][-1][-1])):
        assert explain_click(stand, answer, "base", *outside).token == token


def test_a_click_tells_of_the_nearest_prototype(stand, answer):
    size = picture(answer, "base").size
    click = explain_click(stand, answer, "base", 3.5 * size[0] / 4, 1.5 * size[1] / 4)  # token 7 of a 4 x 4 grid
    assert "cosine 1.000 with prototype 1, the nearest of 3." in click.text
    assert "1. prototype 1, cosine 1.000, token 7 of 2.png: 'sky', 'wall', 'w1'." in click.text
    ranked = answer.explanations[7]
    assert [nearest.score for nearest in ranked] == sorted((nearest.score for nearest in ranked), reverse=True)
    assert sorted(nearest.prototype for nearest in ranked) == [0, 1, 2]
    assert [caption for _, caption in click.sources] == [f"'sky' ({nearest.score:.2f})" for nearest in ranked]
    assert click.patch.tobytes() == click.sources[0][0].tobytes()  # the prototype is this very patch
    assert demo.source_patch(stand, replace(ranked[0], image="built/from/2.png")) is not None
    assert click.picture.size == size and click.picture.tobytes() != picture(answer, "base").tobytes()


def test_prototypes_that_all_say_one_word(stand, answer):
    shared = "All 3 prototypes say 'sky' first"
    assert shared in explain_click(stand, answer, "base", 0, 0).text
    other = replace(stand, provenance=[{**row, "word_1": f"word {n}"} for n, row in enumerate(stand.provenance)])
    assert "prototypes say" not in explain_click(other, answer, "base", 0, 0).text


def test_what_is_not_at_hand_is_said(family, files, stand, wide, answer, tmp_path):
    click = explain_click(replace(stand, sources={}), answer, "base", 0, 0)
    assert not click.sources and "2.png is not among the images" in click.text and "'sky'" in click.text
    shutil.copytree(files / "book", tmp_path / "book")
    (tmp_path / "book" / PROVENANCE_NAME).unlink()
    bare = load_demo(family.folder, tmp_path / "book")
    click = explain_click(bare, ask(bare, wide, "what?", repeats=1, max_new_tokens=1), "base", 0, 0)
    assert not click.sources and "no provenance table" in click.text and "cosine" in click.text
    with pytest.raises(ValueError, match="Ask a question first"):
        explain_click(bare, None, "base", 0, 0)


@pytest.mark.parametrize(("setting", "value"), [(RATIO, 0.25), (THRESHOLD, 0.3)])
def test_both_answers_are_the_models_own(family, stand, wide, setting, value):
    name = {RATIO: "keep_ratio", THRESHOLD: "threshold"}[setting]
    answer = ask(stand, wide, " what? ", setting, value, repeats=1, max_new_tokens=6)
    inputs = family.inputs(["<s>USER: <image>\nwhat? ASSISTANT:"], [wide])
    rule = PruningConfig(**{name: value})
    for side, pruning in ((answer.stock, OFF), (answer.pruned, rule)):
        ids = stand.model.generate(**inputs, pruning=pruning, max_new_tokens=6, do_sample=False)
        said = family.processor.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0]
        assert side.answer == said.strip() and side.seconds > 0
    mask = stand.model(**inputs, pruning=rule).keep_masks[0]
    assert torch.equal(answer.keep_mask, mask)
    assert (answer.stock.tokens, answer.pruned.tokens) == (len(mask), int(mask.sum()))
    dropped = answer.stock.tokens - answer.pruned.tokens
    per_token = answer.stock.cache // inputs.input_ids.shape[1]
    assert dropped > 0 and answer.stock.cache - answer.pruned.cache == dropped * per_token
    table = demo.figures(answer)
    assert f"| visual tokens | {len(mask)} | {int(mask.sum())} |" in table and "KV cache" in table


def test_the_models_other_settings_stay(stand):
    own = stand.model.pruning
    try:
        stand.model.pruning = PruningConfig(threshold=0.5, newlines="last", min_tokens=2)
        assert demo.pruning_of(stand, RATIO, 0.4) == PruningConfig(keep_ratio=0.4, newlines="last", min_tokens=2)
        assert stand.default(THRESHOLD) == 0.5 and stand.default(RATIO) == 0.3  # the codebook's
    finally:
        stand.model.pruning = own


def test_requests_at_once_do_not_meet(stand, wide):
    def kept(value):
        answer = ask(stand, wide, "what?", RATIO, value, repeats=1, max_new_tokens=4)
        return answer.pruned.answer, answer.stock.answer, answer.pruned.tokens

    values = [0.1, 0.5, 1.0, 0.25] * 2
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(kept, values)) == [kept(value) for value in values]


def test_the_picture_shows_what_the_model_sees(family, wide, answer):
    shown = picture(answer, "base")
    # LLaVA-1.5's processor takes the central square.
    assert max(shown.size) == demo.SHOWN and (shown.width == shown.height) == (family.name == "llava")
    if family.name == "llava":
        assert answer.image.tobytes() == wide.crop((29, 0, 59, 30)).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 150), (150, 1)])
def test_thin_images(stand, size):
    answer = ask(stand, Image.new("RGB", size, "red"), "what?", repeats=1, max_new_tokens=1)
    for view in answer.grids:
        patch = explain_click(stand, answer, view, 0, 0).patch
        assert (255, 0, 0) in [colour for _, colour in patch.getcolors()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, "what?"), "Pick or upload an image"),
        (("photo", ""), "Ask a question"),
        (("photo", "  "), "Ask a question"),
        (("photo", None), "Ask a question"),
        (("photo", "<image> what?"), "placeholder"),
        (("photo", "what?", "colour"), "Choose keep ratio or threshold"),
        (("photo", "what?", RATIO, 0.0), r"\(0, 1\]"),
        (("photo", "what?", THRESHOLD, None), "exactly one"),
    ],
)
def test_bad_questions_give_one_sentence(stand, wide, arguments, words):
    with pytest.raises(ValueError, match=words):
        ask(stand, *(wide if argument == "photo" else argument for argument in arguments))


def test_uploads(tmp_path):
    (tmp_path / "broken.png").write_text("not a photo")
    with pytest.raises(ValueError, match="broken.png is no image"):
        open_photo(tmp_path / "broken.png")
    with pytest.raises(ValueError, match="Pick or upload"):
        open_photo(None)
    turned = Image.Exif()
    turned[274] = 6  # held upright, stored lying
    Image.new("RGBA", (20, 10)).convert("RGB").save(tmp_path / "phone.jpg", exif=turned)
    assert open_photo(tmp_path / "phone.jpg").size == (10, 20)
    Image.new("LA", (20, 10)).save(tmp_path / "grey.png")
    assert open_photo(tmp_path / "grey.png").mode == "RGB"


def test_images_and_questions_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="has no images"):
        demo.image_files(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        demo.image_files(tmp_path / "nowhere")
    files = {name: tmp_path / name for name in ("1.png", "2.png")}
    assert demo.asked_of(tmp_path, files) == {}
    rows = [("1.png", "b?", "x"), ("2.png", "a?", ["y", "z"]), ("1.png", "c?", 3), ("elsewhere.png", "d?", "x")]
    lines = [json.dumps({"image": image, "question": question, "answer": answer}) for image, question, answer in rows]
    (tmp_path / "questions.jsonl").write_text("\n\n".join(lines))
    assert demo.asked_of(tmp_path, files) == {
        files["1.png"]: {"b?": "x", "c?": "3"},
        files["2.png"]: {"a?": "y or z"},
    }
    for wrong in ("[1]", "{", '{"image": "1.png", "question": "a?"}'):
        (tmp_path / "questions.jsonl").write_text(wrong)
        with pytest.raises(ValueError, match="questions.jsonl does not hold"):
            demo.asked_of(tmp_path, files)
    assert all(path.is_file() for path in demo.sample_photos().values()) and len(demo.sample_photos()) == 2


def test_the_limits_that_a_card_names(tmp_path):
    assert demo.limits_of(str(tmp_path)) is None and demo.limits_of("org/never-downloaded") is None
    card = tmp_path / "README.md"
    for text, limits in {
        "# A model\n\nNo limits.": None,
        "# A\n\n## Limitations\n\nReads digits,\nnothing else.\n\nMore.\n\n## B\n": "Reads digits, nothing else.",
        "## limits\nOne.": "One.",
        "## Limits\n\n## Next\n\nText": None,
    }.items():
        card.write_text(text)
        assert demo.limits_of(str(tmp_path)) == limits
    assert "a photo of yours means nothing" in demo.limits_of(str(demo.default_model()))


def test_what_cannot_be_loaded(family, files, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.loading, "DEFAULT_MODEL", "nowhere")
    with pytest.raises(ValueError, match="give --model"):
        load_demo()
    with pytest.raises(ValueError, match="has no codebook: give --codebook"):
        load_demo(family.folder)
    shutil.copytree(files / "book", tmp_path / "book")
    lines = (tmp_path / "book" / PROVENANCE_NAME).read_text().splitlines(True)
    (tmp_path / "book" / PROVENANCE_NAME).write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="2 rows, but the codebook 3"):
        load_demo(family.folder, tmp_path / "book")
    for arguments, words in (([], "give --model"), (["--model", str(family.folder)], "give --codebook")):
        result = CliRunner().invoke(app, ["demo", *arguments])
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert [words in line for line in result.stderr.splitlines() if line.startswith("rbl: ")] == [True]


def test_a_checkpoint_with_everything_inside_runs_as_a_space(family, stand, files, tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio")
    stand.model.save_pretrained(tmp_path / "model")
    family.processor.save_pretrained(tmp_path / "model")
    shutil.copytree(files / "book", tmp_path / "model" / "codebook")
    shutil.copytree(files / "images", tmp_path / "model" / "images")
    loaded = load_demo(tmp_path / "model")
    assert loaded.provenance == stand.provenance
    assert [path.name for path in loaded.images] == ["0.png", "1.png", "2.png", "3.png"]
    launched = []
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **kwargs: launched.append(kwargs))
    monkeypatch.setenv("RBL_MODEL", str(tmp_path / "model"))
    monkeypatch.delenv("RBL_CODEBOOK", raising=False)
    shutil.copy(Path(demo.__file__).with_name("app.py"), tmp_path / "app.py")
    runpy.run_path(str(tmp_path / "app.py"), run_name="__main__")
    assert len(launched) == 1 and launched[0]["server_name"] is None


# --- the page ---------------------------------------------------------------------------------------------------------


def digits(folder):
    """Images and questions of the testbed: a wide one first."""
    folder.mkdir()
    drawn = next(examples("llava_next", "image", "test", 1, 7, grid=(1, 2)))
    drawn.pictures()[0].save(folder / "0.png")
    for number, other in enumerate(examples("llava_next", "image", "test", 5, 100), start=1):
        other.pictures()[0].save(folder / f"{number}.png")
    lines = [json.dumps({"image": "0.png", "question": text, "answer": said}) for _, text, said in drawn.questions]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def page_demo(tmp_path_factory):
    """The default checkpoint for a screenshot; else a small one whose codebook holds tokens of the uploaded image."""
    folder = tmp_path_factory.mktemp("page")
    images = digits(folder / "images")
    if "RBL_SCREENSHOT" in os.environ:
        try:
            return load_demo(images=os.environ.get("RBL_IMAGES", images))
        except ValueError as error:
            print(error)
    family = make_family("llava_next", folder / "model", **tiny_checkpoint.QUICKSTART)
    model = family.rbl_class.from_pretrained(family.folder).eval()
    image = open_photo(images / "0.png")
    write_codebook(folder / "book", model, family.processor, image, "0.png", [0, 9, 21])
    return load_demo(family.folder, folder / "book", images)


@pytest.fixture
def page(page_demo):
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with playwright.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, BROWSERS)), driver.chromium.executable_path)
        if not Path(found).exists():
            pytest.skip("no chromium: apt-get install chromium, or playwright install chromium")
        served = demo.launch(page_demo, "127.0.0.1", port, prevent_thread_lock=True, quiet=True)
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root has no sandbox
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(20_000)
            page.goto(f"http://127.0.0.1:{port}")
            yield page
        finally:
            browser.close()
            served.close()


def inside(image, across, down):
    """A place in a picture, which stands in the middle of its element, by shares of its width and height."""
    box = image.bounding_box()
    width, height = image.evaluate("element => [element.naturalWidth, element.naturalHeight]")
    scale = min(box["width"] / width, box["height"] / height)
    return {
        "x": box["width"] / 2 + (across - 0.5) * width * scale,
        "y": box["height"] / 2 + (down - 0.5) * height * scale,
    }


def test_the_page_in_a_browser(page, page_demo, tmp_path):
    from playwright.sync_api import expect

    expect.set_options(timeout=20_000)  # the machine may be busy
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    toast = page.locator(".toast-body")
    upload, figures, send = page.locator("input[type=file]"), page.locator("#figures table"), page.locator("#ask")

    def numbers(value):
        """Visual tokens, stock and pruned, after asking with the slider there."""
        before = figures.inner_text() if figures.count() else ""
        page.locator("#value input[type=range]").fill(value)
        send.click()
        expect(figures).to_contain_text("visual tokens", timeout=20_000)
        expect(figures).not_to_have_text(before, timeout=20_000)  # times always differ
        return [int(text) for text in re.search(r"visual tokens\s+(\d+)\s+(\d+)", figures.inner_text()).groups()]

    send.click()
    expect(toast).to_contain_text("Pick or upload an image first.")
    (tmp_path / "broken.png").write_text("not a photo")
    upload.set_input_files(tmp_path / "broken.png")
    expect(toast).to_contain_text("broken.png is no image that can be read")
    expect(page.locator("#photo img")).to_have_count(0)

    image = open_photo(page_demo.images[0])
    image.save(tmp_path / "photo.png")
    upload.set_input_files(tmp_path / "photo.png")
    expect(page.locator("#photo img")).to_be_visible()
    page.locator("#question textarea, #question input").first.fill("  ")
    send.click()
    expect(toast).to_contain_text("Ask a question first.")
    page.get_by_role("button", name=page_demo.questions[0]).first.click()
    stock, many = numbers("0.5")
    again, few = numbers("0.15")
    assert stock == again > many > few > 0
    expect(page.locator("#true")).to_have_count(0)  # nobody knows what is in an uploaded photo

    for view, (row, column) in {"base": (2, 5), "tiles": (6, 14)}.items():
        shown = page.locator(f"#{view} img")
        expect(shown).to_be_visible()
        columns = 8 if view == "base" else 16
        shown.click(position=inside(shown, (column - 0.5) / columns, (row - 0.5) / 8))
        said = page.locator("#patch textarea")
        expect(said).to_have_value(re.compile(rf"row {row}, column {column} of the {demo.VIEWS[view]}"))
        assert re.search(r"Score: cosine -?[01]\.\d{3} with prototype \d+", said.input_value())
        expect(page.locator("#here img")).to_be_visible()
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        expect(page.locator("#there .thumbnail-item")).to_have_count(3)
        for nearest in page.locator("#there .thumbnail-item").all():  # with its words at the lower edge
            box, frame = nearest.bounding_box(), page.locator("#there").bounding_box()
            assert box["x"] + box["width"] <= frame["x"] + frame["width"]
            assert box["y"] + box["height"] <= frame["y"] + frame["height"]
    page.locator("#setting").get_by_text("threshold").click()
    expect(page.locator("#value")).to_contain_text("Threshold")
    assert numbers("1")[1] > few

    page.locator("#images img").first.click()  # another image: what the last one left goes
    expect(figures).to_have_count(0)
    expect(page.locator("#base img")).to_be_hidden()
    expect(page.locator("#stock textarea, #stock input").first).to_have_value("")
    numbers("1")
    expect(page.locator("#patch textarea")).to_have_value("")
    answers = page_demo.asked[page_demo.images[0]]
    expect(page.locator("#true textarea, #true input").first).to_have_value(next(iter(answers.values())))
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not errors and "Traceback" not in page.content()

    if path := os.environ.get("RBL_SCREENSHOT"):
        page.locator("#setting").get_by_text("keep ratio").click()
        expect(page.locator("#value")).to_contain_text("Keep ratio")
        numbers("0.2")
        shown = page.locator("#base img")
        shown.click(position=inside(shown, 0.06, 0.06))
        expect(page.locator("#here img")).to_be_visible()
        expect(toast).to_have_count(0, timeout=20_000)
        page.screenshot(path=path, full_page=True)
