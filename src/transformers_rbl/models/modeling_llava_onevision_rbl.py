"""LLaVA-OneVision with pruned visual tokens: single images with tiles, several images, video."""

from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel

from .configuration_rbl import LlavaOnevisionRBLConfig
from .families import FAMILIES
from .features_rbl import RBLModelMixin
from .generation_rbl import RBLGenerationMixin


class LlavaOnevisionModelRBL(RBLModelMixin, LlavaOnevisionModel, stock=LlavaOnevisionModel):
    """The headless model. See [`LoadingMixin.from_pretrained`] for what loading takes."""

    config_class = LlavaOnevisionRBLConfig
    family = FAMILIES["llava_onevision"]


class LlavaOnevisionRBL(
    RBLGenerationMixin,
    LlavaOnevisionForConditionalGeneration,
    stock=LlavaOnevisionForConditionalGeneration,
    headless=LlavaOnevisionModelRBL,
):
    """LLaVA-OneVision whose language model sees only the visual tokens that a codebook keeps.

    Use it as `LlavaOnevisionForConditionalGeneration`; see [`LoadingMixin.from_pretrained`] for codebook and settings.
    """

    config_class = LlavaOnevisionRBLConfig


__all__ = ["LlavaOnevisionModelRBL", "LlavaOnevisionRBL"]
