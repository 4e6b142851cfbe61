"""Resizing as one more rule: the image shrunk, before the vision tower, until it gives about as many visual tokens.

A tower that takes images of any size (Qwen3-VL's) is given a smaller one of the same shape. One of a fixed size is
given a smaller square, with its learned positions interpolated to it by the stock tower's own code; of an image in
tiles every tile and the base image shrink, of a video every frame. Sides are rounded up to whole patches (pooled tokens
of a video), so that resizing never gets fewer tokens than a rule that keeps a share.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from transformers_rbl.models.pruning import kept_token_count

from ..encoding import Encoded, encode_all
from ..testbed import Example
from ..tokens import POOLED, family_of, vision_side


def encode_resized(model: PreTrainedModel, examples: Sequence[Example], ratio: float) -> list[Encoded]:
    """The examples, shrunk until an image (tile, frame) gives the share `ratio` of its visual tokens, or a few more.

    Args:
        model (`PreTrainedModel`): a testbed's; it stays as it is.
        examples (`Sequence[Example]`): of one kind.
        ratio (`float`): in (0, 1].
    """
    config = model.config
    if family_of(config) == "qwen3_vl":
        unit = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        shrunk = []
        for example in examples:
            rows, columns = (length // unit for length in example.images[0].shape[:2])
            share = math.sqrt(kept_token_count(rows * columns, ratio) / (rows * columns))
            shrunk.append(resized(example, math.ceil(rows * share) / rows, math.ceil(columns * share) / columns))
        return encode_all(model, shrunk)
    side, step = vision_side(config), POOLED if examples[0].video else 1
    smaller = step * math.ceil(math.sqrt(kept_token_count((side // step) ** 2, ratio)))
    share = smaller / side
    return encode_all(with_side(model, smaller), [resized(example, share, share) for example in examples])


def resized(example: Example, height: float, width: float) -> Example:
    """The example with its images shrunk to these shares of their height and width, and no labels: what a smaller patch
    shows, nobody knows."""
    images = []
    for image in example.images:
        size = (round(image.shape[1] * width), round(image.shape[0] * height))
        images.append(np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)))
    rows, columns = example.labels[0].shape
    labels = [np.zeros((round(rows * height), round(columns * width)), int)] * len(images)
    return replace(example, images=images, labels=labels, window=None)


def with_side(model: PreTrainedModel, side: int) -> PreTrainedModel:
    """A copy of a model whose vision tower takes square images (tiles, frames) of `side` patches."""
    smaller = copy.deepcopy(model)
    config, pixels = smaller.config, side * model.config.vision_config.patch_size
    tower = smaller.model.vision_tower
    embeddings = getattr(tower, "vision_model", tower).embeddings
    places = embeddings.position_embedding.weight
    patches = places.new_empty(1, side**2 + len(places) - embeddings.num_patches, places.shape[1])
    with torch.no_grad():
        places = embeddings.interpolate_pos_encoding(patches, pixels, pixels)[0]
    embeddings.position_embedding = torch.nn.Embedding.from_pretrained(places)
    embeddings.position_ids = torch.arange(len(places))[None]
    embeddings.image_size = pixels
    if hasattr(config, "image_grid_pinpoints"):
        before = config.vision_config.image_size
        config.image_grid_pinpoints = [
            [side * pixels // before for side in size] for size in config.image_grid_pinpoints
        ]
    config.vision_config.image_size = pixels
    return smaller
