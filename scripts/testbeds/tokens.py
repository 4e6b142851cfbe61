"""An example's visual tokens: inputs without the processor's loops, where each token lies, and what it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .testbed import Example


@dataclass(frozen=True)
class Visual:
    """The visual tokens of one image of a prompt, or of its video.

    Args:
        tokens (`torch.Tensor` of shape `(n, d)`).
        views (`tuple[torch.Tensor, ...]`): of the same shape, what deepstack adds to the language model's first layers.
        places (`torch.LongTensor` of shape `(3, n)`, *optional*): time, row and column for m-RoPE, from the image's
            first token, or three times the place in the image; None where what is left is numbered one after the other.
        extent (`int`): with `places`, how far after the image's first token the text goes on.
    """

    tokens: torch.Tensor
    views: tuple[torch.Tensor, ...] = ()
    places: torch.Tensor | None = None
    extent: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def kept(self, mask: torch.Tensor) -> Visual:
        """What stays of it, at the places it had; the text stays where it was."""
        places = None if self.places is None else self.places[:, mask]
        return replace(self, tokens=self.tokens[mask], views=tuple(view[mask] for view in self.views), places=places)

    def placed(self, mask: torch.Tensor) -> Visual:
        """At the places that these tokens have in the whole image, which `mask` `(n,)` bool tells; text behind it."""
        return replace(self, places=mask.nonzero()[:, 0].expand(3, -1), extent=len(mask))

    def numbered(self) -> Visual:
        """With places in the whole image, so that what stays of it keeps them."""
        return self if self.places is not None else self.placed(torch.ones(len(self), dtype=torch.bool))

    def renumbered(self) -> Visual:
        """One after the other, as if there were no gaps and no rows."""
        return replace(self, places=None)


POOLED = 2  # LLaVA-OneVision pools a video's tokens over so many patches a side


def family_of(config: PretrainedConfig) -> str:
    return config.model_type.removesuffix("_rbl")


def vision_side(config: PretrainedConfig) -> int:
    """Patches along one side of a tile; 0 where images are taken at any size."""
    return getattr(config.vision_config, "image_size", 0) // config.vision_config.patch_size


def normalise(images: np.ndarray) -> torch.Tensor:
    """Pixel values of images `(n, height, width, 3)` uint8, as the image processors make them."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def visual_inputs(config: PretrainedConfig, batch: Sequence[Example]) -> dict:
    """What the family's processor returns for the images of a batch of one size, without its loops."""
    family = family_of(config)
    images = np.stack([image for example in batch for image in example.images])
    height, width = images.shape[1:3]
    if batch[0].video:
        return {"pixel_values_videos": normalise(images).unflatten(0, (len(batch), -1))}
    if family == "llava":
        return {"pixel_values": normalise(images)}
    if family == "qwen3_vl":
        vision = config.vision_config
        rows, columns = height // vision.patch_size, width // vision.patch_size
        pixels = normalise(images).unflatten(2, (rows, -1)).unflatten(4, (columns, -1))  # (n, 3, rows, p, columns, p)
        patches = in_blocks(pixels.permute(0, 2, 4, 1, 3, 5), vision.spatial_merge_size)
        patches = patches.unsqueeze(3).expand(-1, -1, -1, vision.temporal_patch_size, -1, -1)
        grids = torch.tensor([[1, rows, columns]] * len(images))
        return {"pixel_values": patches.flatten(0, 1).flatten(1), "image_grid_thw": grids}
    sizes = torch.tensor([[height, width]] * len(images))
    if family == "llava_onevision":
        counts = [len(example.images) for example in batch]
        return {"pixel_values": normalise(images)[:, None], "image_sizes": sizes, "batch_num_images": counts}
    side = config.vision_config.image_size
    base = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    for shape in ((height, side), (side, side)):  # one axis after the other, in whole levels: as PIL does
        base = F.interpolate(base, shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    tiles = torch.from_numpy(images).unflatten(1, (-1, side)).unflatten(3, (-1, side))
    tiles = tiles.permute(0, 1, 3, 2, 4, 5).flatten(1, 2)
    pixels = torch.cat([base.permute(0, 2, 3, 1).to(torch.uint8)[:, None], tiles], 1)
    values = normalise(pixels.flatten(0, 1).numpy())
    return {"pixel_values": values.unflatten(0, pixels.shape[:2]), "image_sizes": sizes}


def in_blocks(patches: torch.Tensor, side: int) -> torch.Tensor:
    """Patches `(n, rows, columns, …)` as `(n, rows · columns, …)` in the order of a tower that merges blocks of `side`
    patches a side: block by block."""
    blocks = patches.unflatten(1, (-1, side)).unflatten(3, (-1, side))  # (n, rows, side, columns, side, …)
    return blocks.transpose(2, 3).flatten(1, 4)


def encode(model: PreTrainedModel, batch: Sequence[Example], **settings: object) -> list[list[Visual]]:
    """Visual tokens of each example's images, or of its video, by the stock model's own code; `settings` go to it."""
    return visuals_of(model, batch, *features_of(model, batch, **settings))


def features_of(model: PreTrainedModel, batch: Sequence[Example], **settings: object) -> tuple[dict, Any]:
    """What the encoding method is given for a batch of one size, `settings` aside, and what it returns."""
    inputs = visual_inputs(model.config, batch)
    method = model.model.get_video_features if batch[0].video else model.model.get_image_features
    return inputs, method(**inputs, **settings, return_dict=True)


def visuals_of(model: PreTrainedModel, batch: Sequence[Example], inputs: dict, outputs: Any) -> list[list[Visual]]:
    """Visual tokens of each example's images, or of its video, given [`features_of`] them."""
    visuals = [Visual(tokens) for tokens in outputs.pooler_output]
    if batch[0].video:
        return [[video] for video in visuals]
    if family_of(model.config) == "qwen3_vl":
        merge = model.config.vision_config.spatial_merge_size
        for index, grid in enumerate(inputs["image_grid_thw"]):
            views = tuple(layer[index] for layer in outputs.deepstack_features)
            places = model.model.get_vision_position_ids(0, grid, 1, merge)
            extent = int(grid[1:].max()) // merge
            visuals[index] = Visual(visuals[index].tokens, views, places, extent)
    count = len(batch[0].images)
    return [visuals[i : i + count] for i in range(0, len(visuals), count)]


def token_centres(config: PretrainedConfig, example: Example) -> torch.Tensor:
    """`(n, 2)`: row and column, in the image's patches, of each visual token's centre; NaN where it has none."""
    rows, columns = example.labels[0].shape
    family, side = family_of(config), vision_side(config)
    if family == "qwen3_vl":
        merge = config.vision_config.spatial_merge_size
        return grid_centres(rows, columns, rows // merge, columns // merge)
    if family == "llava":
        return grid_centres(rows, columns, side, side)
    if family == "llava_next":
        ends = torch.cat([grid_centres(rows, 1, rows, 1), torch.full((rows, 1), torch.nan)], 1)[:, [0, 2]]
        tiles = grid_centres(rows, columns, rows, columns).view(rows, columns, 2)
        tiles = torch.cat([tiles, ends[:, None]], 1).flatten(0, 1)
        return torch.cat([grid_centres(rows, columns, side, side), tiles])
    end = torch.full((1, 2), torch.nan)
    if example.video:
        return torch.cat([grid_centres(rows, columns, (side + 1) // 2, (side + 1) // 2)] * len(example.images) + [end])
    return torch.cat([torch.cat([grid_centres(rows, columns, side, side), end])] * len(example.images))


def grid_centres(height: float, width: float, rows: int, columns: int) -> torch.Tensor:
    y, x = (torch.arange(rows) + 0.5) * height / rows, (torch.arange(columns) + 0.5) * width / columns
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)


def subject_shares(config: PretrainedConfig, example: Example) -> torch.Tensor:
    """`(n,)`: share of each visual token's patches that show what questions ask about, 0 for row ends."""
    return patch_shares(config, example, example.subjects())


def patch_shares(config: PretrainedConfig, example: Example, patches: Sequence[np.ndarray]) -> torch.Tensor:
    """`(n,)`: share of each visual token's patches that are among `patches`, per image `(rows, columns)` bool; 0 for
    row ends. A token of a base image or of a pooled frame covers several."""
    shown = [torch.from_numpy(part).float()[None] for part in patches]
    family, side = family_of(config), vision_side(config)
    if family == "qwen3_vl":
        return F.avg_pool2d(shown[0], config.vision_config.spatial_merge_size).flatten()
    if family == "llava":
        return shown[0].flatten()
    if family == "llava_next":
        return torch.cat([F.adaptive_avg_pool2d(shown[0], side).flatten(), F.pad(shown[0], (0, 1)).flatten()])
    if example.video:
        return torch.cat([F.avg_pool2d(subject, POOLED).flatten() for subject in shown] + [torch.zeros(1)])
    return torch.cat([F.pad(subject.flatten(), (0, 1)) for subject in shown])


def window_mask(
    random: np.random.Generator, centres: torch.Tensor, shares: torch.Tensor, example: Example
) -> torch.Tensor:
    """Which tokens lie in the example's window, every other time without some of those that show nothing
    that questions ask about. Row ends stay."""
    top, left, height, width = example.window
    low, high = torch.tensor([top, left]), torch.tensor([top + height, left + width])
    mask = ~((centres < low) | (centres >= high)).any(1)
    if random.random() < 0.5:
        gaps = torch.from_numpy(random.random(len(mask)) < random.random())
        mask &= ~gaps | (shares > 0) | centres.isnan().any(1)
    return mask
