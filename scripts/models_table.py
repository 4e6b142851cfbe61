"""The table of families in docs/models.md: what FAMILIES says, and what tiny models of each family measure.

python scripts/models_table.py > docs/models.md
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from transformers_rbl.building.showing import why_not
from transformers_rbl.integrations.vllm import ARCHITECTURES
from transformers_rbl.models.families import FAMILIES
from transformers_rbl.models.family import VIDEOS
from transformers_rbl.models.layout import NEWLINE


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from families.conftest import Kit
from families.tiny import CASES


PAGE = """# Models

{count} families of vision-language models, each tested against the stock class on a tiny random model of its real
architecture: every contract of [Contracts](contracts.md), an oracle that runs the method by hand on the stock model,
save, load and remote code. `family_class("{example}")`, `rbl_class("a/checkpoint")` and
`from transformers_rbl import {example_class}` give the pruned class; a family that the installed transformers lacks is
absent, and other families raise, naming these (`allow_untested=True` tries).

{head}
{rows}

- **Budget of**: what `keep_ratio` counts: an image, an image with all its tiles, or each tile, where the tiles of an
  image are told apart by text in the prompt.
- **Known before encoding**: how many visual tokens an image has and how they lie is known without running the vision
  tower.
- **Video**: a budget for each frame (`per_frame=True`) or for the video; "per temporal patch": time is averaged away
  within a few frames, and these have a budget; "frames as images": the processor hands frames over as images, and each
  has an image's budget.
- **Row ends**: what ends a row of visual tokens, which `newlines=` is about: a learnt token, or a mark in text. `"row"`
  drops those of rows from which nothing stays, `"last"` all but an image's last.
- **`tiles="base"`**: an image in tiles comes with a thumbnail, and the tower may see it alone; blank where images have
  no tiles. It raises where nothing tells which tile is the thumbnail.
- **\\[cls\\]**: `score="cls_similarity_low"` and `"cls_similarity_high"` work on towers that have the token.
- **Positions**: 1-D ones close up, unless `keep_positions=True`; with m-RoPE a token that stays keeps its time, row and
  column.
- **Builder**: `rbl build` can probe it, on an image in one piece whose tokens lie in a grid.
- **vLLM**: `vllm serve` takes its checkpoints as they are saved.
- **Raises**: what the stock class answers wrongly or not at all, so that the pruned class refuses it in one sentence.

Made by `python scripts/models_table.py` from `FAMILIES` and from what its models measure, with transformers {version};
the test suite compares this page with what the script gives.
"""


COLUMNS = (
    "model type", "class", "budget of", "known before encoding", "video", "row ends", '`tiles="base"`', "\\[cls\\]",
    "positions", "builder", "vLLM", "raises",
)  # fmt: skip


def page(kit_of: Callable[[str], Kit]) -> str:
    """The whole page, given a tiny model of each family."""
    example = "qwen3_vl"
    return PAGE.format(
        count=len(FAMILIES),
        example=example,
        example_class=kit_of(example).full.__name__,
        head="| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS),
        rows="\n".join("| " + " | ".join(row(kit_of(name))) + " |" for name in FAMILIES),
        version=".".join(transformers.__version__.split(".")[:2]),
    )


@torch.no_grad()
def row(kit: Kit) -> list[str]:
    """The cells of one family."""
    headless, family = kit.model.model, kit.model.family
    layouts = headless.layouts("image", **kit.case.visual([kit.one]))
    newlines = layouts is not None and any(bool((layout.kinds == NEWLINE).any()) for layout in layouts)
    has_tiles = layouts is not None and any(layout.has_tiles for layout in layouts)
    together = has_tiles or family.apart is not None
    thumbnails = has_tiles or family.tile_length is not None
    units = len(kit.model(**kit.inputs(kit.one)).keep_masks)
    return [
        f"`{kit.name}`",
        f"`{kit.full.__name__}`",
        "tile" if units > 1 else "image, its tiles together" if together else "image",
        yes(layouts is not None),
        video(kit),
        "yes" if newlines else "in text" if family.row_marks else "",
        "raises" if family.tiled else yes(thumbnails),
        yes(family.has_cls(headless)),
        "m-RoPE" if hasattr(headless, "get_rope_index") else "1-D",
        yes(why_not(kit.model) is None),
        yes(kit.full.__name__ in ARCHITECTURES),
        "; ".join(family.refuses),
    ]


def video(kit: Kit) -> str:
    """How videos come: measured where the suite has them."""
    if kit.case.video is not None:
        layouts = kit.model.model.layouts("video", **kit.case.movies()[0].tensors)
        assert layouts is not None
        return "per frame or whole" if layouts[0].frames > 1 else "per temporal patch"
    if VIDEOS in kit.model.family.refuses:
        return "raises"
    if kit.name == "llava_onevision":  # in a file of tests of its own, tests/test_video.py
        return "per frame or whole"
    if hasattr(kit.full.headless, "get_video_features"):
        return "not tested"
    modalities: Any = getattr(kit.case.stock, "input_modalities", ())
    return "frames as images" if "video" in modalities or kit.name == "smolvlm" else ""


def yes(holds: bool) -> str:
    return "yes" if holds else ""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(page(lambda name: Kit(CASES[name], CASES[name].build(Path(folder, name)))), end="")
