"""The demo's page, in gradio (`pip install transformers_rbl[demo]`)."""

# No `from __future__ import annotations`: gradio reads the annotations of its handlers, and they must not be strings.
import functools
import html
from collections.abc import Callable
from typing import Any

import gradio as gr
import torch
from PIL import Image

from .asking import NEAREST, Answer, ask, figures
from .clicks import explain_click
from .loading import RATIO, THRESHOLD, Demo, open_photo
from .pictures import VIEWS, picture


TITLE = "Fewer visual tokens"
SLIDERS = {RATIO: (0.01, 1.0), THRESHOLD: (0.0, 1.0)}
MOST_IMAGES = 12
STYLE = """
#images img { aspect-ratio: 1; object-fit: cover; }
#figures table { width: 100%; }
#figures th, #figures td { word-break: normal; overflow-wrap: normal; padding: 6px 8px; }
#figures td + td { white-space: nowrap; }
#there .grid-wrap { padding-top: 32px; min-height: 0; }
#there .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)); }
"""


def one_sentence(handler: Callable) -> Callable:
    """Bad input is one sentence on the page, which stays as it is."""

    @functools.wraps(handler)
    def run(*args: Any) -> Any:
        try:
            return handler(*args)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            sentence = (str(error).strip() or type(error).__name__).splitlines()[0]
            gr.Warning(html.escape(sentence))
            return gr.skip()

    return run


def interface(demo: Demo) -> gr.Blocks:
    """The page.

    Args:
        demo ([`Demo`]): what it asks.

    Returns:
        `gradio.Blocks`: see [`launch`].
    """

    def no_patch() -> tuple[Any, ...]:
        return "", None, gr.Gallery([], visible=False)

    def nothing() -> tuple[Any, ...]:
        """What the last image left on the page goes when another one is chosen."""
        answers = "", "", gr.Textbox("", visible=False), ""
        return None, *answers, gr.Column(visible=False), *(None for _ in VIEWS), *no_patch()

    @one_sentence
    def pick(index: int) -> tuple[Any, ...]:
        path = demo.images[index]
        image, answers = open_photo(path), demo.asked.get(path, {})
        return image, answers, image, next(iter(answers), gr.skip()), *nothing()

    @one_sentence
    def upload(path: str | None) -> tuple[Any, ...]:
        image = open_photo(path)
        return image, {}, image, gr.skip(), *nothing()

    @one_sentence
    def send_question(
        image: Image.Image | None, answers: dict[str, str], question: str | None, setting: str, value: float
    ) -> tuple[Any, ...]:
        answer = ask(demo, image, question, setting, value)
        true = answers.get((question or "").strip())
        texts = answer.stock.answer, answer.pruned.answer, gr.Textbox(true, visible=true is not None), figures(answer)
        pictures = [
            gr.Image(picture(answer, view) if view in answer.grids else None, visible=view in answer.grids)
            for view in VIEWS
        ]
        return answer, *texts, gr.Column(visible=bool(answer.grids)), *pictures, *no_patch()

    def clicked(view: str) -> Callable:
        @one_sentence
        def run(answer: Answer | None, event: gr.SelectData) -> tuple[Any, ...]:
            x, y = event.index
            click = explain_click(demo, answer, view, x, y)
            assert answer is not None  # or it had raised
            others = {name: picture(answer, name) for name in answer.grids if name != view}  # their frames go
            pictures = [click.picture if name == view else others.get(name) for name in VIEWS]
            return *pictures, click.text, click.patch, gr.Gallery(click.sources, visible=bool(click.sources))

        return run

    def slider(setting: str) -> gr.Slider:
        low, high = SLIDERS[setting]
        return gr.Slider(low, high, demo.default(setting), step=0.01, label=setting.capitalize(), elem_id="value")

    plain = {"interactive": False, "buttons": []}
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(
            f"# {TITLE}\nOne question, two answers: **{html.escape(demo.name)}** with every visual token, and without "
            "those that look like a codebook's redundant ones."
        )
        chosen, known, last = gr.State(), gr.State({}), gr.State()
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
                if demo.limits is not None:
                    gr.Markdown(f"Before you upload a photo: {demo.limits}", elem_id="limits")
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
                    true = gr.Textbox(label="True answer", interactive=False, visible=False, elem_id="true")
                table = gr.Markdown(elem_id="figures")
        with gr.Column(visible=False) as below:
            gr.Markdown("Bright patches stayed, dark ones were dropped. Click one to see why.")
            with gr.Row():
                views = [gr.Image(label=VIEWS[view].capitalize(), height=480, elem_id=view, **plain) for view in VIEWS]
            text = gr.Textbox(label="This patch", lines=8, interactive=False, elem_id="patch")
            with gr.Row():
                here = gr.Image(label="Patch", height=280, elem_id="here", **plain)
                there = gr.Gallery(
                    label="Nearest prototypes, and the word that each says alone",
                    columns=NEAREST,
                    height="auto",
                    scale=3,
                    object_fit="contain",
                    visible=False,
                    elem_id="there",
                    **plain,
                )
        shown = [last, stock, pruned, true, table, below, *views, text, here, there]
        images.click(pick, images, [chosen, known, photo, question, *shown])
        button.upload(upload, button, [chosen, known, photo, question, *shown])
        setting.change(slider, setting, value)
        # One question at a time: two at once would spoil each other's prefill times.
        gr.on(
            [send.click, question.submit],
            send_question,
            [chosen, known, question, setting, value],
            shown,
            concurrency_limit=1,
        )
        for view, image in zip(VIEWS, views):
            image.select(clicked(view), last, [*views, text, here, there])
    return app


def launch(
    demo: Demo, host: str | None = None, port: int | None = None, share: bool = False, **kwargs: Any
) -> gr.Blocks:
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
    app.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size="20mb",
        state_session_capacity=100,
        footer_links=["gradio"],
        css=STYLE,
        **kwargs,
    )
    return app
