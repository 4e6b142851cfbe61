"""A processor's output by what its parts are: what runs along the prompt, what describes images, and where these lie.

Evaluation, verification, demo and builder encode images by themselves, with any family's processor.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .models.families import FAMILIES
from .models.layout import VisualLayout
from .models.prompt import PromptReading
from .models.seam import ROLES, Call, Role


ALONG_PROMPT = (Role.IDS, Role.EMBEDS, Role.MASK, Role.POSITIONS, Role.ALONG)
OF_IMAGES = (Role.PIXELS, Role.VISUAL)


def split_inputs(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A processor's output in two.

    Args:
        inputs (`BatchFeature` or `Mapping[str, Any]`): of a processor.

    Returns:
        `tuple[dict, dict]`: ids, mask and whatever else runs along the prompt; pixels and what describes them.

    Raises:
        ValueError: for a part of which it is not known what it is.
    """
    if unknown := [name for name in inputs if ROLES.get(name) not in ALONG_PROMPT + OF_IMAGES]:
        raise ValueError(f"The processor returns {', '.join(unknown)}, and it is not known what that describes.")
    along = {name: inputs[name] for name in inputs if ROLES[name] in ALONG_PROMPT}
    return along, {name: inputs[name] for name in inputs if name not in along}


def image_arguments(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What `get_image_features` takes of a processor's output.

    Args:
        model (`PreTrainedModel`): full or headless, stock or pruned.
        inputs (`BatchFeature` or `Mapping[str, Any]`): of a processor, with images.
    """
    return Call.read(dict(inputs)).arguments_of_encoder(model.base_model.get_image_features, "image")


def inputs_with_features(model: Any, inputs: Mapping[str, Any], features: Any) -> dict[str, Any]:
    """Arguments of `forward` or `generate` where the images are encoded already.

    Args:
        model (`PreTrainedModel`): full or headless, stock or pruned.
        inputs (`BatchFeature` or `Mapping[str, Any]`): of a processor, with images.
        features (`ModelOutput`): of `get_image_features`, pruned or not.

    Returns:
        `dict[str, Any]`: what runs along the prompt, the features, and the grids by which a family with positions in
        three dimensions places them.
    """
    along, visual = split_inputs(inputs)
    rope = getattr(model.base_model, "get_rope_index", None)
    placed_by = () if rope is None else inspect.signature(rope).parameters
    grids = {name: value for name, value in visual.items() if name in placed_by}
    return {**along, **grids, "mm_encoder_outputs": {"image": features}}


def image_runs(model: Any, input_ids: torch.Tensor) -> list[int]:
    """Lengths of the runs of image placeholders in prompts `(batch, L)`, in order; of images, where marks between their
    tiles tell (see [`Family`])."""
    family = FAMILIES.get(model.config.model_type.removesuffix("_rbl"))
    apart = None if family is None else family.apart
    slots = {"image": input_ids == model.config.image_token_id}
    return PromptReading(None, input_ids.shape, slots).runs("image", apart or 0)[0]


def layout_of(
    layouts: Sequence[VisualLayout] | None, lengths: Sequence[int], runs: Sequence[int]
) -> VisualLayout | None:
    """Where the tokens of a prompt's one image lie in it.

    Args:
        layouts (`Sequence[VisualLayout]`, *optional*): of the headless model, for families that know them beforehand.
        lengths (`Sequence[int]`): visual tokens of the image, or of each of its tiles.
        runs (`Sequence[int]`): of placeholders, see [`image_runs`].

    Returns:
        [`VisualLayout`]. Without `layouts`: rows, where text ends each of them, else a square. None for several tiles,
        whose places in the image no processor tells, and for a number of tokens that is no square.
    """
    if layouts is not None:
        return layouts[0] if len(layouts) == 1 else None
    if len(lengths) != 1:
        return None
    if len(runs) > 1:
        return VisualLayout.of_patches(lengths[0], grid=(len(runs), runs[0])) if len(set(runs)) == 1 else None
    side = math.isqrt(lengths[0])
    return VisualLayout.of_patches(lengths[0]) if side * side == lengths[0] else None
