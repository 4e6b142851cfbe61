"""LLaVA-NeXT (1.6) with pruned visual tokens."""

import torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .configuration_rbl import LlavaNextRBLConfig
from .generation_rbl import RBLGenerationMixin
from .modeling_rbl import RBLModelMixin
from .pruning import BASE, NEWLINE, PATCH


class LlavaNextModelRBL(RBLModelMixin, LlavaNextModel, stock=LlavaNextModel):
    """The headless model. See [`RBLMixin.from_pretrained`] for what loading takes."""

    config_class = LlavaNextRBLConfig

    def _num_tiles(self, image_sizes) -> list[int]:
        """Tiles per image, the base image counted."""
        side, pinpoints = self.config.vision_config.image_size, self.config.image_grid_pinpoints
        return [image_size_to_num_patches(size, pinpoints, side) for size in image_sizes]

    def token_kinds(self, pixel_values, image_sizes, vision_feature_select_strategy=None, **_) -> list[torch.Tensor]:
        """What each visual token is: stock packing code, run on labels in place of features."""
        tiles = self._num_tiles(image_sizes)
        images = len(pixel_values) if pixel_values.ndim == 5 else len(tiles)
        if images != len(tiles):
            raise ValueError(f"{images} images came with {len(tiles)} image_sizes.")
        vision = self.config.vision_config
        labels = [
            torch.full((count, (vision.image_size // vision.patch_size) ** 2, 1), float(PATCH)) for count in tiles
        ]
        for label in labels:
            label[0] = BASE if len(label) > 1 else PATCH
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        packed, _ = self.pack_image_features(
            labels, image_sizes, strategy, image_newline=torch.tensor([float(NEWLINE)])
        )
        return [kinds[:, 0].long() for kinds in packed]

    def _select(self, call: dict, images: list[int]) -> None:
        """Keep only these images in the arguments `call`."""
        sizes, pixels = call["image_sizes"], call["pixel_values"]
        tiles = pixels if pixels.ndim == 5 else pixels.split(self._num_tiles(sizes))
        chosen = [tiles[i] for i in images]
        call["pixel_values"] = None if not chosen else (torch.stack if pixels.ndim == 5 else torch.cat)(chosen)
        call["image_sizes"] = sizes[images]

    def _base_features(self, call: dict):
        """Features of the base images alone, by the code of LLaVA-1.5, which has no tiles."""
        pixels, sizes = call.pop("pixel_values"), call.pop("image_sizes")
        if pixels.ndim == 5:
            base = pixels[:, 0]
        else:
            tiles = torch.tensor(self._num_tiles(sizes))
            base = pixels[(tiles.cumsum(0) - tiles).to(pixels.device)]
        return LlavaModel.get_image_features(self, pixel_values=base, return_dict=True, **call)


class LlavaNextForConditionalGenerationRBL(
    RBLGenerationMixin,
    LlavaNextForConditionalGeneration,
    stock=LlavaNextForConditionalGeneration,
    headless=LlavaNextModelRBL,
):
    """LLaVA-NeXT whose language model sees only the visual tokens that a codebook keeps.

    Use it as `LlavaNextForConditionalGeneration`; see [`RBLMixin.from_pretrained`] for the codebook and settings.
    """

    config_class = LlavaNextRBLConfig


__all__ = ["LlavaNextForConditionalGenerationRBL", "LlavaNextModelRBL"]
