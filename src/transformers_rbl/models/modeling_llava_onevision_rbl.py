"""LLaVA-OneVision with pruned visual tokens: single images with tiles, several images, video."""

from itertools import groupby

from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel

from .configuration_rbl import LlavaOnevisionRBLConfig
from .features_rbl import RBLModelMixin, anyres_tiles
from .generation_rbl import RBLGenerationMixin


class LlavaOnevisionModelRBL(RBLModelMixin, LlavaOnevisionModel, stock=LlavaOnevisionModel):
    """The headless model. See [`RBLMixin.from_pretrained`] for what loading takes."""

    config_class = LlavaOnevisionRBLConfig

    def _num_tiles(self, call: dict) -> list[int]:
        tiles = anyres_tiles(self.config, call.get("image_sizes"))
        return [n if tiled else 1 for n, tiled in zip(tiles, self._are_tiled(call, len(tiles)))]

    def _are_tiled(self, call: dict, count: int) -> list[bool]:
        """As stock reads `batch_num_images`: tiles for an image that is its prompt's only one."""
        per_prompt = call.get("batch_num_images")
        return [True] * count if per_prompt is None else [int(n) == 1 for n in per_prompt for _ in range(int(n))]

    def _pack(self, tiles, newline, call: dict):
        ratio = call.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        return self.pack_image_features(tiles, call["image_sizes"], image_newline=newline, vision_aspect_ratio=ratio)[0]

    def _select(self, call: dict, indices: list[int], modality: str = "image") -> None:
        if modality == "image" and call.get("batch_num_images") is not None:
            tiled = self._are_tiled(call, len(call["image_sizes"]))
            runs = [(one, len(list(run))) for one, run in groupby(tiled[i] for i in indices)]
            # Stock cannot say "one image, no tiles" but at the end, where it cuts off what is too much.
            if any(not one and length == 1 for one, length in runs[:-1]):
                raise ValueError("Continue these conversations one by one: their new images cannot be told apart.")
            super()._select(call, indices)
            call["batch_num_images"] = [n for one, length in runs for n in ([1] * length if one else [max(length, 2)])]
        else:
            super()._select(call, indices, modality)


class LlavaOnevisionRBL(
    RBLGenerationMixin,
    LlavaOnevisionForConditionalGeneration,
    stock=LlavaOnevisionForConditionalGeneration,
    headless=LlavaOnevisionModelRBL,
):
    """LLaVA-OneVision whose language model sees only the visual tokens that a codebook keeps.

    Use it as `LlavaOnevisionForConditionalGeneration`; see [`RBLMixin.from_pretrained`] for the codebook and settings.
    """

    config_class = LlavaOnevisionRBLConfig


__all__ = ["LlavaOnevisionModelRBL", "LlavaOnevisionRBL"]
