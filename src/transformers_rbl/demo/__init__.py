"""`rbl demo`: a page that asks a model about an image, stock and pruned, and says of each patch why it was dropped.

Everything but the page is plain functions; [`launch`] alone needs gradio (`pip install transformers_rbl[demo]`).
"""

from .page import (
    QUESTION,
    RATIO,
    SHOWN,
    THRESHOLD,
    VIEWS,
    Answer,
    Click,
    Demo,
    Side,
    ask,
    default_model,
    explain_click,
    figures,
    image_files,
    interface,
    launch,
    load_demo,
    open_photo,
    picture,
    pruning_of,
    sample_photos,
    source_patch,
    suggested_questions,
)


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
    "default_model",
    "explain_click",
    "figures",
    "image_files",
    "interface",
    "launch",
    "load_demo",
    "open_photo",
    "picture",
    "pruning_of",
    "sample_photos",
    "source_patch",
    "suggested_questions",
]
