"""Why a token was dropped: the prototype it looks like, where that came from, and what the model said of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..building.inspection import patch
from ..building.provenance import grid_of
from ..models.codebook import RedundancyCodebook


@dataclass
class Explanation:
    """One token and its nearest prototype.

    Args:
        token (`int`): position in its image.
        score (`float`): cosine with the prototype.
        prototype (`int`): row of the codebook.
        image, position (`str`, `int`): where the prototype comes from.
        words (`list[str]`): what the model said when shown that one alone, likeliest first.
        grid (`tuple[int, int]`, *optional*): rows and columns of that image's tokens, where the table says them.
    """

    token: int
    score: float
    prototype: int
    image: str
    position: int
    words: list[str]
    grid: tuple[int, int] | None = None

    def __str__(self) -> str:
        words = ", ".join(repr(word) for word in self.words)
        return (
            f"token {self.token} is redundant because it looks (cosine {self.score:.2f}) like token {self.position} of "
            f"{self.image}, of which the model says {words}"
        )


def explain(
    codebook: RedundancyCodebook, tokens: torch.Tensor, provenance: Sequence[dict[str, str]]
) -> list[Explanation]:
    """The nearest prototype of every token.

    Args:
        codebook ([`RedundancyCodebook`]): built with a provenance table.
        tokens (`torch.Tensor` of shape `(L, d)`): unpruned visual tokens of one base image.
        provenance (`Sequence[dict[str, str]]`): rows of its table, see [`provenance_of`].

    Raises:
        ValueError: if the table is of another codebook.
    """
    return [ranked[0] for ranked in nearest_prototypes(codebook, tokens, provenance, 1)]


def nearest_prototypes(
    codebook: RedundancyCodebook, tokens: torch.Tensor, provenance: Sequence[dict[str, str]], most: int
) -> list[list[Explanation]]:
    """The nearest prototypes of every token, the most similar first.

    Args:
        codebook ([`RedundancyCodebook`]): built with a provenance table.
        tokens (`torch.Tensor` of shape `(L, d)`): unpruned visual tokens of one base image.
        provenance (`Sequence[dict[str, str]]`): rows of its table, see [`provenance_of`].
        most (`int`): so many of each; fewer where the codebook is smaller.

    Raises:
        ValueError: if the table is of another codebook.
    """
    count = len(codebook.prototypes)
    if len(provenance) != count:
        raise ValueError(f"The provenance table has {len(provenance)} rows, but the codebook {count} prototypes.")
    unit = torch.nn.functional.normalize(tokens.detach().float().cpu(), dim=-1)
    best = (unit @ codebook.unit_prototypes.cpu().T).topk(min(most, count), dim=-1)
    built = codebook.built_with.get("model", {})
    explanations = []
    for token, (scores, rows) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
        ranked = []
        for score, row in zip(scores, rows):
            origin = provenance[row]
            words, position = [origin[f"word_{k}"] for k in (1, 2, 3)], int(origin["position"])
            ranked.append(Explanation(token, score, row, origin["image"], position, words, grid_of(origin, built)))
        explanations.append(ranked)
    return explanations


def plot_explanations(
    image: Image.Image,
    explanations: Sequence[Explanation],
    sources: dict[str, Image.Image],
    grid: int | tuple[int, int],
    path: str | os.PathLike[str],
    centre: bool = False,
    most: int = 6,
) -> int:
    """Write pairs of patches: a dropped token's, and the source patch of the prototype it looks like.

    Args:
        image (`PIL.Image.Image`): whose tokens these are.
        explanations (`Sequence[Explanation]`): of its dropped tokens; evenly chosen by score.
        sources (`dict[str, PIL.Image.Image]`): the codebook's images by name.
        grid (`int` or `tuple[int, int]`): rows and columns of the image's tokens (a number is both), and of the source
            images', unless their table says others.
        path (`str` or `os.PathLike`): the picture to write.
        centre (`bool`): whether the processor crops images to their central square.
        most (`int`): pairs at most.

    Returns:
        `int`: pairs drawn; those whose source image is not at hand are left out.

    Raises:
        ValueError: if none is at hand.
    """
    from matplotlib.figure import Figure

    known = sorted((e for e in explanations if e.image in sources), key=lambda e: -e.score)
    if not known:
        raise ValueError("None of the prototypes' source images is among these.")
    shown = [known[i] for i in np.linspace(0, len(known) - 1, min(most, len(known))).astype(int)]
    figure = Figure(figsize=(2.4 * len(shown), 3.6), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, item in enumerate(shown):
        axes[0, column].imshow(patch(image, item.token, grid, centre))
        axes[0, column].set_title(f"token {item.token}, cosine {item.score:.2f}", fontsize=8)
        axes[1, column].imshow(patch(sources[item.image], item.position, item.grid or grid, centre))
        axes[1, column].set_title(f"alone: {', '.join(item.words)[:28]}", fontsize=8, parse_math=False)
    for axis in axes.flatten():
        axis.axis("off")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return len(shown)
