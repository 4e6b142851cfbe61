"""`rbl demo`: the page."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Annotated

import typer

from .shared import Codebook, Device, Dtype, app, check_model, check_placement, one_sentence


@app.command()
@one_sentence
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Stock or pruned checkpoint: folder or Hub id. Default: codebooks/digits-llava-next."),
    ] = None,
    codebook: Codebook = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images to pick from; prototypes' source images are found in it by name."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at; default this machine alone.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free one from 7860.")] = None,
    share: Annotated[bool, typer.Option(help="Ask gradio for a public address.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """A page: stock and pruned answers side by side, what was kept, and why a patch was dropped."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("The demo needs gradio: pip install transformers_rbl[demo].")
    if port is not None:
        check_port(host or "127.0.0.1", port)
    check_model(model)
    from ..demo import launch, load_demo

    check_placement(dtype, device)
    launch(load_demo(model, codebook, images, device, dtype), host, port, share)


def check_port(host: str, port: int) -> None:
    """A port that the page can be served at, before the model loads.

    Raises:
        OSError: if it is taken, or may not be used.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise OSError(f"--port {port} of {host} cannot be had ({error.strerror}): give another one.") from error
