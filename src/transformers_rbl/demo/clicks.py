"""What a click on a patch tells: its score, the prototype that it looks like, and where that comes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from ..building.images import READ_ERRORS
from ..building.inspection import patch
from ..evaluation.explain import Explanation
from .asking import Answer
from .loading import Demo
from .pictures import VIEWS, cell_at, cell_box, cut, enlarged, picture


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
    shape = (grid.shape[0], grid.shape[1])
    row, column = cell_at(shape, x, y, shown.size)
    token = int(grid[row, column])
    nearest, kept = answer.explanations[token], bool(answer.keep_mask[token])
    source = None if demo.provenance is None else source_patch(demo, nearest)
    lines = [
        f"{'Kept' if kept else 'Dropped'}: row {row + 1}, column {column + 1} of the {VIEWS[view]} (token {token}).",
        f"Score: cosine {nearest.score:.3f} with prototype {nearest.prototype}, the nearest of "
        f"{len(demo.model.codebook.prototypes)}.",
    ]
    if demo.provenance is None:
        lines.append("This codebook has no provenance table: nobody knows which patch that was, or what it says.")
    else:
        words = ", ".join(repr(word) for word in nearest.words)
        lines.append(f"It was token {nearest.position} of {nearest.image}. Shown it alone, the model said {words}.")
        if source is None:
            lines.append(f"{nearest.image} is not among the images, so its patch cannot be shown.")
    framed = shown.copy()
    ImageDraw.Draw(framed).rectangle(cell_box(shown.size, shape, row, column), outline=(255, 64, 64), width=5)
    return Click(token, "\n".join(lines), cut(answer.image, shape, row, column), source, framed)


def source_patch(demo: Demo, nearest: Explanation) -> Image.Image | None:
    """The patch that a prototype comes from, and a little around it.

    Args:
        demo ([`Demo`]): codebook and images.
        nearest ([`Explanation`]): the prototype of some token.

    Returns:
        `PIL.Image.Image`, *optional*: None if the prototype's image is not at hand, or the codebook does not say how
        its images were cut into patches.
    """
    built = demo.model.codebook.built_with.get("model", {})
    file = demo.sources.get(nearest.image, demo.sources.get(Path(nearest.image).name))
    if file is None or nearest.grid is None:
        return None
    try:
        with Image.open(file) as image:  # as building opened it: not turned upright
            return enlarged(patch(image.convert("RGB"), nearest.position, nearest.grid, built.get("crop") == "centre"))
    except READ_ERRORS:
        return None
