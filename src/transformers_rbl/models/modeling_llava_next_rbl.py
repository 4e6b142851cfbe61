"""LLaVA-NeXT (1.6) with pruned visual tokens."""

from transformers import LlavaNextForConditionalGeneration, LlavaNextModel

from .configuration_rbl import LlavaNextRBLConfig
from .features_rbl import RBLModelMixin, anyres_tiles
from .generation_rbl import RBLGenerationMixin


class LlavaNextModelRBL(RBLModelMixin, LlavaNextModel, stock=LlavaNextModel):
    """The headless model. See [`RBLMixin.from_pretrained`] for what loading takes."""

    config_class = LlavaNextRBLConfig

    def _num_tiles(self, call: dict) -> list[int]:
        return anyres_tiles(self.config, call.get("image_sizes"))

    def _pack(self, tiles, newline, call: dict):
        return self.pack_image_features(tiles, call["image_sizes"], self._strategy(call), image_newline=newline)[0]


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
