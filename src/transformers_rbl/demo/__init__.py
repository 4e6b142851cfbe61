"""`rbl demo`: a page that asks a model about an image, stock and pruned, and says of each patch why it was dropped.

Everything but the page is plain functions; `page.py` alone needs gradio (`pip install transformers_rbl[demo]`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .asking import Answer, Side, ask, figures, pruning_of
from .clicks import Click, explain_click, source_patch
from .loading import (
    QUESTION,
    RATIO,
    THRESHOLD,
    Demo,
    asked_of,
    default_model,
    image_files,
    limits_of,
    load_demo,
    open_photo,
    sample_photos,
)
from .pictures import SHOWN, VIEWS, picture


if TYPE_CHECKING:
    from .page import interface, launch


def __getattr__(name: str) -> Any:
    if name in ("interface", "launch"):
        from . import page

        return getattr(page, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "QUESTION",
    "RATIO",
    "SHOWN",
    "THRESHOLD",
    "VIEWS",
    "Answer",
    "Click",
    "Demo",
    "Side",
    "ask",
    "asked_of",
    "default_model",
    "explain_click",
    "figures",
    "image_files",
    "interface",
    "launch",
    "limits_of",
    "load_demo",
    "open_photo",
    "picture",
    "pruning_of",
    "sample_photos",
    "source_patch",
]
