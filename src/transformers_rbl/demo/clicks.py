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
        text (`str`): score, nearest prototypes, and where they come from, in sentences.
        patch (`PIL.Image.Image`): the patch and a little around it.
        sources (`list[tuple[PIL.Image.Image, str]]`): the same of the nearest prototypes whose images are at hand, with
            a caption each.
        picture (`PIL.Image.Image`): the whole picture, the patch framed.
    """

    token: int
    text: str
    patch: Image.Image
    sources: list[tuple[Image.Image, str]]
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
    ranked, kept = answer.explanations[token], bool(answer.keep_mask[token])
    lines = [
        f"{'Kept' if kept else 'Dropped'}: row {row + 1}, column {column + 1} of the {VIEWS[view]} (token {token}).",
        f"Score: cosine {ranked[0].score:.3f} with prototype {ranked[0].prototype}, the nearest of "
        f"{len(demo.model.codebook.prototypes)}.",
    ]
    sources: list[tuple[Image.Image, str]] = []
    if demo.provenance is None:
        lines.append("This codebook has no provenance table: nobody knows which patches those were, or what they say.")
    else:
        lines.append("The nearest prototypes, and what the model said when it was shown each alone:")
        for number, nearest in enumerate(ranked, start=1):
            words = ", ".join(repr(word) for word in nearest.words)
            place = f"token {nearest.position} of {nearest.image}"
            lines.append(f"{number}. prototype {nearest.prototype}, cosine {nearest.score:.3f}, {place}: {words}.")
            if (source := source_patch(demo, nearest)) is None:
                lines[-1] += f" {nearest.image} is not among the images, so its patch cannot be shown."
            else:
                sources.append((source, f"{nearest.words[0]!r} ({nearest.score:.2f})"))
        first = {row["word_1"] for row in demo.provenance}
        if len(first) == 1:
            lines.append(
                f"All {len(demo.provenance)} prototypes say {first.pop()!r} first, whatever they show: the model's "
                "answer to an image that says nothing."
            )
    framed = shown.copy()
    ImageDraw.Draw(framed).rectangle(cell_box(shown.size, shape, row, column), outline=(255, 64, 64), width=5)
    return Click(token, "\n".join(lines), cut(answer.image, shape, row, column), sources, framed)


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
