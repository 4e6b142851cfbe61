"""`rbl demo`: a page that asks a model about an image, stock and pruned, and says of each patch why it was dropped.

Everything but the page is plain functions; `interface` alone needs gradio (`pip install transformers_rbl[demo]`). This
file is also a Hugging Face Space's app.py: RBL_MODEL, RBL_CODEBOOK and RBL_IMAGES say what to load.
"""

# No `from __future__ import annotations`: gradio reads the annotations of its handlers, and they must not be strings.
import functools
import html
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from transformers import AutoProcessor

from transformers_rbl import PruningConfig, rbl_class
from transformers_rbl.building.images import READ_ERRORS, SUFFIXES
from transformers_rbl.building.inspection import patch, provenance_of
from transformers_rbl.evaluation.evaluate import OFF, prompt_inputs
from transformers_rbl.evaluation.explain import Explanation, explain
from transformers_rbl.evaluation.plots import dim_dropped, kept_grids
from transformers_rbl.evaluation.questions import Question
from transformers_rbl.evaluation.timing import compare_prefills
from transformers_rbl.models.layout import NEWLINE


TITLE = "Fewer visual tokens"
DEFAULT_MODEL = "digits-llava-next"
RATIO, THRESHOLD = "keep ratio", "threshold"
SLIDERS = {RATIO: (0.01, 1.0), THRESHOLD: (0.0, 1.0)}
QUESTION = "What is shown in this image?"
REPEATS = 3  # timed prefills of each, after one that warms up
MAX_NEW_TOKENS = 64
MOST_IMAGES, MOST_QUESTIONS = 12, 6
SHOWN = 960  # pixels: longer side of a displayed picture
UNKNOWN = {"image": "", "position": "-1", "word_1": "", "word_2": "", "word_3": ""}
VIEWS = {"base": "base image", "tiles": "tiles"}


@dataclass
class Demo:
    """What all requests share; nothing in it changes after loading.

    Args:
        model (`RBLGenerationMixin`): a full pruned model with a codebook, in eval mode.
        processor (`ProcessorMixin`): the checkpoint's.
        name (`str`): what the model is called.
        images (`list[Path]`): to pick from.
        questions (`list[str]`): to pick from.
        provenance (`list[dict[str, str]]`, *optional*): rows of the codebook's table.
        sources (`dict[str, Path]`): image files by the names that the table may give them.
    """

    model: Any
    processor: Any
    name: str
    images: list[Path]
    questions: list[str]
    provenance: list[dict[str, str]] | None
    sources: dict[str, Path]

    def default(self, setting: str) -> float:
        """Where the slider of a setting begins: the model's own setting, the codebook's, or a guess."""
        name = {RATIO: "keep_ratio", THRESHOLD: "threshold"}[setting]
        own, recommended = getattr(self.model.pruning, name, None), getattr(self.model.codebook, f"recommended_{name}")
        return next((value for value in (own, recommended) if value is not None), {RATIO: 0.2, THRESHOLD: 0.6}[setting])


@dataclass
class Side:
    """What one of both models did.

    Args:
        answer (`str`): what it said.
        tokens (`int`): visual tokens that its language model saw.
        seconds (`float`): median time of a prefill, image included.
        cache (`int`): bytes of the KV cache after it.
    """

    answer: str
    tokens: int
    seconds: float
    cache: int


@dataclass
class Answer:
    """A question asked of both models, and what a click on a patch looks up.

    Args:
        image (`PIL.Image.Image`): the part of the photo that the tokens show.
        stock, pruned ([`Side`]): both models.
        keep_mask (`torch.BoolTensor` of shape `(L,)`): the visual tokens that stayed.
        grids (`dict[str, np.ndarray]`): `"base"` and, with tiles, `"tiles"`: `(rows, columns)` positions of tokens.
        explanations (`list[Explanation]`): of all L tokens.
        scores (`tuple[float, float, float]`): least and greatest score, and the greatest one kept.
    """

    image: Image.Image
    stock: Side
    pruned: Side
    keep_mask: torch.Tensor
    grids: dict[str, np.ndarray]
    explanations: list[Explanation]
    scores: tuple[float, float, float]


@dataclass
class Click:
    """What is known of one patch.

    Args:
        token (`int`): its position among the image's visual tokens.
        text (`str`): score, prototype, and where that comes from, in sentences.
        patch (`PIL.Image.Image`): the patch and a little around it.
        source (`PIL.Image.Image`, *optional*): the same of the nearest prototype, where its image is at hand.
        picture (`PIL.Image.Image`): the whole picture, the patch framed.
    """

    token: int
    text: str
    patch: Image.Image
    source: Image.Image | None
    picture: Image.Image


def default_model() -> Path:
    """The repository's demonstration checkpoint.

    Raises:
        ValueError: if it is not there, as in an installed package.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "codebooks", package.parents[1] / "codebooks"):
        if (folder / DEFAULT_MODEL / "config.json").is_file():
            return folder / DEFAULT_MODEL
    raise ValueError(f"codebooks/{DEFAULT_MODEL} is not here, so give --model: a checkpoint's folder or Hub id.")


def load_demo(
    model: str | os.PathLike | None = None, codebook: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None, device: str | None = None, dtype: str = "auto",
) -> Demo:  # fmt: skip
    """Load everything once.

    Args:
        model (`str` or `os.PathLike`, *optional*): stock or pruned checkpoint, folder or Hub id; default
            [`default_model`].
        codebook (`str` or `os.PathLike`, *optional*): folder or Hub id; needed unless the checkpoint has one.
        images (`str` or `os.PathLike`, *optional*): folder of images to pick from, in which the prototypes' source
            images are looked for; a `questions.jsonl` in it gives questions to pick from. Default: `images` in the
            model's folder, else two photos that come with scikit-learn.
        device (`str`, *optional*): default a GPU if there is one.
        dtype (`str`): as in `from_pretrained`.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: if there is no model, no codebook or no image, or a provenance table is of another codebook.
    """
    model = str(default_model() if model is None else model)
    folder = Path(model, "images") if images is None and Path(model, "images").is_dir() else images
    files = sample_photos() if folder is None else image_files(folder)
    loaded = rbl_class(model).from_pretrained(model, codebook=codebook, dtype=dtype).eval()
    if loaded.codebook is None:
        raise ValueError(f"{model} has no codebook: give --codebook.")
    provenance = next(filter(None, map(provenance_of, _codebook_places(model, codebook))), None)
    count = len(loaded.codebook.prototypes)
    if provenance is not None and len(provenance) != count:
        raise ValueError(f"The provenance table has {len(provenance)} rows, but the codebook {count} prototypes.")
    loaded = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Demo(
        loaded, AutoProcessor.from_pretrained(model), Path(model).name, list(files.values()),
        [QUESTION] if folder is None else suggested_questions(folder), provenance,
        {**{path.name: path for path in files.values()}, **files},
    )  # fmt: skip


def sample_photos() -> dict[str, Path]:
    """Two photos that come with scikit-learn: files by name."""
    from sklearn.datasets import load_sample_images

    return {Path(name).name: Path(name) for name in load_sample_images().filenames}


def image_files(folder: str | os.PathLike) -> dict[str, Path]:
    """Image files of a folder, searched in depth, by their path in it, sorted.

    Raises:
        ValueError: if it is no folder, or holds no images.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder of images.")
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))}).")
    return {str(path.relative_to(folder)): path for path in found}


def suggested_questions(folder: str | os.PathLike) -> list[str]:
    """The first different questions of a folder's `questions.jsonl`, the format of `rbl evaluate`.

    Raises:
        ValueError: if the file is there, but does not hold questions.
    """
    file = Path(folder, "questions.jsonl")
    if not file.is_file():
        return [QUESTION]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        found = dict.fromkeys(str(json.loads(line)["question"]) for line in lines if line.strip())
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not hold a question in every line ({error!r}).") from error
    return list(found)[:MOST_QUESTIONS] or [QUESTION]


def open_photo(path: str | os.PathLike | None) -> Image.Image:
    """An uploaded file as an RGB image, upright.

    Args:
        path (`str` or `os.PathLike`, *optional*): None if nothing was uploaded.

    Raises:
        ValueError: if it is no image that can be read.
    """
    if path is None:
        raise ValueError("Pick or upload an image first.")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except READ_ERRORS as error:
        raise ValueError(f"{Path(path).name} is no image that can be read: upload another one.") from error


def pruning_of(demo: Demo, setting: str, value: float) -> PruningConfig:
    """The slider as settings: the model's own, but for keep ratio and threshold, and scored by cosine.

    Args:
        demo ([`Demo`]): whose model.
        setting (`str`): `"keep ratio"` or `"threshold"`.
        value (`float`): the slider's.

    Raises:
        ValueError: for a setting out of range.
    """
    if setting not in SLIDERS:
        raise ValueError(f"Choose {' or '.join(SLIDERS)}, not {setting}.")
    limit = {"keep_ratio": value, "threshold": None} if setting == RATIO else {"keep_ratio": None, "threshold": value}
    return replace(demo.model.pruning or OFF, **limit, score="cosine", enabled=True)


def seen_part(demo: Demo, image: Image.Image, inputs) -> Image.Image:
    """The part of an image that its tokens show: all of it, its central square where the processor crops, or more than
    it where the processor pads.

    Args:
        demo ([`Demo`]): whose processor.
        image (`PIL.Image.Image`): the photo.
        inputs (`BatchFeature`): what the processor made of it.
    """
    if "image_sizes" in inputs:  # tiles, or a tower for any shape
        return image
    if getattr(demo.processor.image_processor, "do_pad", False):
        return ImageOps.pad(image, (max(image.size),) * 2)
    if getattr(demo.processor.image_processor, "do_center_crop", False):
        return ImageOps.fit(image, (min(image.size),) * 2)
    return image


def token_grids(demo: Demo, inputs, kinds: torch.Tensor) -> dict[str, np.ndarray]:
    """Where one image's tokens lie.

    Args:
        demo ([`Demo`]): whose model.
        inputs (`BatchFeature`): of one image.
        kinds (`torch.LongTensor` of shape `(L,)`): what each token is.

    Returns:
        `dict[str, np.ndarray]`: `"base"` and, where the image has tiles, `"tiles"`, each `(rows, columns)` positions
        of tokens. Both cover the whole image.
    """
    positions = torch.arange(len(kinds))
    if "image_sizes" in inputs and not hasattr(demo.model.config, "image_grid_pinpoints"):
        # Pixtral's grid has the image's shape.
        rows = int(inputs["image_sizes"][0][0]) // demo.model.config.vision_config.patch_size
        return {"base": positions.view(rows, -1).numpy()}
    return kept_grids(positions, kinds)


@torch.no_grad()
def ask(
    demo: Demo, image: Image.Image | None, question: str | None, setting: str = RATIO, value: float = 0.2,
    repeats: int = REPEATS, max_new_tokens: int = MAX_NEW_TOKENS,
) -> Answer:  # fmt: skip
    """Ask both models. Settings travel with the calls: any number of threads may ask at once.

    Args:
        demo ([`Demo`]): model, processor and codebook.
        image (`PIL.Image.Image`, *optional*): the photo; None raises.
        question (`str`, *optional*): an empty one raises.
        setting (`str`): `"keep ratio"` or `"threshold"`.
        value (`float`): of the setting.
        repeats (`int`): timed prefills of each, stock and pruned in turn.
        max_new_tokens (`int`): length of an answer; decoding is greedy.

    Raises:
        ValueError: without image or question, for a setting out of range, or a question with an image's placeholder.
    """
    if image is None:
        raise ValueError("Pick or upload an image first.")
    question = (question or "").strip()
    if not question:
        raise ValueError("Ask a question first.")
    special = [getattr(demo.processor, name, None) for name in ("image_token", "video_token")]
    if any(token and token in question for token in special):
        raise ValueError("A question is plain text: take the image's placeholder out.")
    model, pruning = demo.model, pruning_of(demo, setting, value)
    inputs = prompt_inputs(demo.processor, Question([image], question, []), "", model.device, model.dtype)
    seconds, cache, output = compare_prefills(model, inputs, {"stock": OFF, "pruned": pruning}, repeats)
    mask, kinds = output.keep_masks[0].cpu(), model.model.token_kinds(**inputs)[0]
    sides = []
    for rule, tokens, name in ((OFF, len(mask), "stock"), (pruning, int(mask.sum()), "pruned")):
        ids = model.generate(**inputs, pruning=rule, max_new_tokens=max_new_tokens, do_sample=False)
        said = demo.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        sides.append(Side(said.strip(), tokens, seconds[name], cache[name]))
    visual = {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}
    tokens = model.get_image_features(**visual, pruning=OFF, return_dict=True).pooler_output[0]
    table = demo.provenance or [UNKNOWN] * len(model.codebook.prototypes)
    explanations = explain(model.codebook, tokens, table)
    scores = torch.tensor([item.score for item in explanations])
    patches = kinds != NEWLINE
    span = (float(scores[patches].min()), float(scores[patches].max()), float(scores[patches & mask].max()))
    return Answer(
        seen_part(demo, image, inputs), *sides, mask, token_grids(demo, inputs, kinds), explanations, span
    )  # fmt: skip


def figures(answer: Answer) -> str:
    """Tokens, time and memory of both models as a Markdown table, and the scores' range."""
    stock, pruned = answer.stock, answer.pruned
    low, high, kept = answer.scores
    rows = [
        ("visual tokens", f"{stock.tokens}", f"{pruned.tokens}", pruned.tokens / stock.tokens),
        (
            f"prefill, median of {REPEATS}",
            f"{stock.seconds * 1e3:.1f} ms",
            f"{pruned.seconds * 1e3:.1f} ms",
            pruned.seconds / stock.seconds,
        ),
        ("KV cache", f"{stock.cache / 2**20:.2f} MiB", f"{pruned.cache / 2**20:.2f} MiB", pruned.cache / stock.cache),
    ]
    lines = ["| | stock | pruned | pruned / stock |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {before} | {after} | {share:.0%} |" for name, before, after, share in rows]
    scores = f"This image's tokens score {low:.2f} to {high:.2f}; the highest score kept is {kept:.2f}."
    return "\n".join([*lines, "", scores])


def picture(answer: Answer, view: str) -> Image.Image:
    """The image as the page shows it, dropped patches dimmed.

    Args:
        answer ([`Answer`]): whose image.
        view (`str`): `"base"` or `"tiles"`.
    """
    width, height = answer.image.size
    scale = SHOWN / max(width, height)  # small ones grow: the page then never has to, and clicks fall where they should
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return dim_dropped(answer.image.resize(size), answer.keep_mask.numpy()[answer.grids[view]])


def cell_at(shape: tuple[int, int], x: float, y: float, size: tuple[int, int]) -> tuple[int, int]:
    """Row and column of a grid under a pixel of a picture.

    Args:
        shape (`tuple[int, int]`): rows and columns of the grid, which covers the picture.
        x, y (`float`): the pixel, from the upper left corner; outside the picture the nearest cell counts.
        size (`tuple[int, int]`): width and height of the picture.
    """
    (rows, columns), (width, height) = shape, size
    return min(max(int(y * rows / height), 0), rows - 1), min(max(int(x * columns / width), 0), columns - 1)


def explain_click(demo: Demo, answer: Answer | None, view: str, x: float, y: float) -> Click:
    """What is known of the patch under a pixel of [`picture`].

    Args:
        demo ([`Demo`]): provenance and source images.
        answer ([`Answer`], *optional*): whose picture was clicked; None raises.
        view (`str`): which picture, `"base"` or `"tiles"`.
        x, y (`float`): the pixel.

    Raises:
        ValueError: if nothing was asked yet, or the image has no such view.
    """
    if answer is None or view not in answer.grids:
        raise ValueError("Ask a question first, then click a patch.")
    shown, grid = picture(answer, view), answer.grids[view]
    row, column = cell_at(grid.shape, x, y, shown.size)
    token = int(grid[row, column])
    found, kept = answer.explanations[token], bool(answer.keep_mask[token])
    source = None if demo.provenance is None else source_patch(demo, found)
    lines = [
        f"{'Kept' if kept else 'Dropped'}: row {row + 1}, column {column + 1} of the {VIEWS[view]} (token {token}).",
        f"Score: cosine {found.score:.3f} with prototype {found.prototype}, the nearest of "
        f"{len(demo.model.codebook.prototypes)}.",
    ]
    if demo.provenance is None:
        lines.append("This codebook has no provenance table: nobody knows which patch that was, or what it says.")
    else:
        words = ", ".join(repr(word) for word in found.words)
        lines.append(f"It was token {found.position} of {found.image}. Shown it alone, the model said {words}.")
        if source is None:
            lines.append(f"{found.image} is not among the images, so its patch cannot be shown.")
    framed = shown.copy()
    ImageDraw.Draw(framed).rectangle(_cell_box(shown.size, grid.shape, row, column), outline=(255, 64, 64), width=5)
    return Click(token, "\n".join(lines), _cut(answer.image, grid.shape, row, column), source, framed)


def source_patch(demo: Demo, found: Explanation) -> Image.Image | None:
    """The patch that a prototype comes from, and a little around it; None if its image is not at hand, or the codebook
    does not say how its images were cut into patches."""
    built = demo.model.codebook.built_with.get("model", {})
    file = demo.sources.get(found.image, demo.sources.get(Path(found.image).name))
    if file is None or "grid" not in built:
        return None
    try:
        with Image.open(file) as image:  # as building opened it: not turned upright
            return _enlarged(patch(image.convert("RGB"), found.position, built["grid"], built.get("crop") == "centre"))
    except READ_ERRORS:
        return None


def _cell_box(size, shape, row: int, column: int, around: float = 0.0) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a cell in a picture of `size`, with `around` cells on each side."""
    width, height = size[0] / shape[1], size[1] / shape[0]
    left, top = round((column - around) * width), round((row - around) * height)
    right, bottom = round((column + 1 + around) * width), round((row + 1 + around) * height)
    return left, top, max(right, left + 1), max(bottom, top + 1)  # never empty, however thin the picture


def _cut(image: Image.Image, shape, row: int, column: int) -> Image.Image:
    return _enlarged(image.crop(_cell_box(image.size, shape, row, column, around=0.5)))


def _enlarged(image: Image.Image, side: int = 240) -> Image.Image:
    scale = side / max(*image.size, 1)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _codebook_places(model: str, codebook: str | os.PathLike | None) -> list[str | os.PathLike]:
    """Where a provenance table may be: beside the codebook given, or in the checkpoint, or in a folder of it."""
    if codebook is not None:
        return [codebook]
    return [model, Path(model, "codebook")] if Path(model).is_dir() else [model]


def interface(demo: Demo):
    """The page.

    Args:
        demo ([`Demo`]): what it asks.

    Returns:
        `gradio.Blocks`: see [`launch`].
    """
    import gradio as gr

    def told(handler):
        """Bad input is one sentence on the page, which stays as it is."""

        @functools.wraps(handler)
        def run(*args):
            try:
                return handler(*args)
            except (ValueError, OSError, torch.OutOfMemoryError) as error:
                sentence = (str(error).strip() or type(error).__name__).splitlines()[0]
                gr.Warning(html.escape(sentence))
                return gr.skip()

        return run

    @told
    def pick(index):
        image = open_photo(demo.images[index])
        return image, image

    @told
    def upload(path):
        image = open_photo(path)
        return image, image

    @told
    def answered(image, question, setting, value):
        answer = ask(demo, image, question, setting, value)
        views = [
            gr.Image(picture(answer, view) if view in answer.grids else None, visible=view in answer.grids)
            for view in VIEWS
        ]
        cleared = "", None, gr.Image(None, visible=False)
        return (
            answer,
            answer.stock.answer,
            answer.pruned.answer,
            figures(answer),
            gr.Column(visible=True),
            *views,
            *cleared,
        )

    def clicked(view):
        @told
        def run(answer, event: gr.SelectData):
            click = explain_click(demo, answer, view, *event.index)
            others = {name: picture(answer, name) for name in answer.grids if name != view}  # their frames go
            shown = [click.picture if name == view else others.get(name) for name in VIEWS]
            return *shown, click.text, click.patch, gr.Image(click.source, visible=click.source is not None)

        return run

    def slider(setting):
        low, high = SLIDERS[setting]
        return gr.Slider(low, high, demo.default(setting), step=0.01, label=setting.capitalize(), elem_id="value")

    plain = {"interactive": False, "buttons": []}
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(
            f"# {TITLE}\nOne question, two answers: **{html.escape(demo.name)}** with every visual token, and without "
            "those that look like a codebook's redundant ones."
        )
        chosen, last = gr.State(), gr.State()
        with gr.Row():
            with gr.Column():
                photo = gr.Image(label="Image", height=360, elem_id="photo", **plain)
                samples = [[str(path)] for path in demo.images[:MOST_IMAGES]]
                images = gr.Dataset(
                    components=[gr.Image(render=False)],
                    samples=samples,
                    type="index",
                    label="Images",
                    samples_per_page=MOST_IMAGES,
                    elem_id="images",
                )
                button = gr.UploadButton("Upload an image", file_types=["image"], elem_id="upload")
            with gr.Column():
                question = gr.Textbox(demo.questions[0], label="Question", max_length=2000, elem_id="question")
                if len(demo.questions) > 1:
                    gr.Examples(demo.questions, question, label="Questions")
                setting = gr.Radio(list(SLIDERS), value=RATIO, label="Keep tokens by", elem_id="setting")
                value = slider(RATIO)
                send = gr.Button("Ask", variant="primary", elem_id="ask")
                with gr.Row():
                    stock = gr.Textbox(label="Stock answer", interactive=False, elem_id="stock")
                    pruned = gr.Textbox(label="Pruned answer", interactive=False, elem_id="pruned")
                table = gr.Markdown(elem_id="figures")
        with gr.Column(visible=False) as below:
            gr.Markdown("Bright patches stayed, dark ones were dropped. Click one to see why.")
            with gr.Row():
                views = [gr.Image(label=VIEWS[view].capitalize(), height=480, elem_id=view, **plain) for view in VIEWS]
            with gr.Row():
                text = gr.Textbox(label="This patch", lines=5, scale=2, interactive=False, elem_id="patch")
                here = gr.Image(label="Patch", height=240, elem_id="here", **plain)
                there = gr.Image(label="Nearest prototype's patch", height=240, visible=False, elem_id="there", **plain)
        images.click(pick, images, [chosen, photo])
        button.upload(upload, button, [chosen, photo])
        setting.change(slider, setting, value)
        # One question at a time: two at once would spoil each other's prefill times.
        gr.on(
            [send.click, question.submit], answered, [chosen, question, setting, value],
            [last, stock, pruned, table, below, *views, text, here, there], concurrency_limit=1,
        )  # fmt: skip
        for view, image in zip(VIEWS, views):
            image.select(clicked(view), last, [*views, text, here, there])
    return app


def launch(demo: Demo, host: str | None = None, port: int | None = None, share: bool = False, **kwargs):
    """Serve the page until interrupted.

    Args:
        demo ([`Demo`]): what it asks.
        host (`str`, *optional*): address to listen at; default gradio's, this machine alone.
        port (`int`, *optional*): default a free one from 7860.
        share (`bool`): ask gradio for a public address.
        kwargs: as in `gradio.Blocks.launch`.

    Returns:
        `gradio.Blocks`: the page, where `prevent_thread_lock=True` is given.

    Raises:
        OSError: if the port is taken.
    """
    app = interface(demo)
    squares = "#images img { aspect-ratio: 1; object-fit: cover; }"
    app.launch(
        server_name=host, server_port=port, share=share, max_file_size="20mb", state_session_capacity=100,
        footer_links=["gradio"], css=squares, **kwargs,
    )  # fmt: skip
    return app
