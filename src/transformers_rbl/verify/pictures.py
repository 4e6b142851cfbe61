"""A picture to ask about, and prototypes for a model that has none."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from ..building.images import READ_ERRORS
from ..evaluation.evaluate import prompt_text
from ..inputs import image_arguments
from ..models.codebook import RedundancyCodebook
from ..models.seam import TOKENS
from .report import first_line
from .subject import QUESTION


RANDOM_PROTOTYPES = 8


def drawn_picture(width: int = 448, height: int = 336) -> Image.Image:
    """A picture without network or files: colours that change everywhere, a few shapes, and noise."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    colours = np.stack([across, down, 1 - across * down], axis=-1) * 200
    noise = np.random.RandomState(0).randint(0, 56, (height, width, 3))
    image = Image.fromarray((colours + noise).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 4, width // 2, 7 * height // 8), fill=(220, 40, 40), outline="black", width=4)
    draw.rectangle((5 * width // 8, height // 8, 7 * width // 8, height // 2), fill=(40, 90, 220))
    draw.polygon([(width // 2, height), (3 * width // 4, height // 2), (width, height)], fill=(30, 160, 70))
    return image


def open_picture(path: str | os.PathLike) -> Image.Image:
    """A picture's file as RGB, upright.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except READ_ERRORS as error:
        raise ValueError(f"{path} is no image that can be read ({first_line(error)}).") from error


@torch.no_grad()
def codebook_of_picture(model: Any, processor: Any, image: Image.Image) -> RedundancyCodebook:
    """A codebook for a model that has none: random visual tokens of a picture. It says nothing of what is redundant,
    and exercises everything.

    Args:
        model (`RBLGenerationMixin`): a full pruned model whose pruning is off.
        processor (`ProcessorMixin`): the checkpoint's.
        image (`PIL.Image.Image`): the picture.
    """
    text = prompt_text(processor, QUESTION, 1)
    inputs = processor(images=[[image]], text=[text], return_tensors="pt").to(model.device, model.dtype)
    encoded = model.base_model.get_image_features(**image_arguments(model, inputs), return_dict=True)
    tokens = torch.cat(model.family.split(model.config, list(encoded[TOKENS]))).float()
    tokens = tokens[(tokens != 0).any(-1)]
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[:RANDOM_PROTOTYPES]
    return RedundancyCodebook(tokens[chosen.to(tokens.device)])
