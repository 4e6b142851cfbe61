"""LLaVA-NeXT (1.6) with pruned visual tokens."""

from transformers import LlavaNextForConditionalGeneration, LlavaNextModel

from .configuration_rbl import LlavaNextRBLConfig
from .families import FAMILIES
from .features_rbl import RBLModelMixin
from .generation_rbl import RBLGenerationMixin


class LlavaNextModelRBL(RBLModelMixin, LlavaNextModel, stock=LlavaNextModel):
    """The headless model. See [`LoadingMixin.from_pretrained`] for what loading takes."""

    config_class = LlavaNextRBLConfig
    family = FAMILIES["llava_next"]


class LlavaNextForConditionalGenerationRBL(
    RBLGenerationMixin,
    LlavaNextForConditionalGeneration,
    stock=LlavaNextForConditionalGeneration,
    headless=LlavaNextModelRBL,
):
    """LLaVA-NeXT whose language model sees only the visual tokens that a codebook keeps.

    Use it as `LlavaNextForConditionalGeneration`; see [`LoadingMixin.from_pretrained`] for the codebook and settings.
    """

    config_class = LlavaNextRBLConfig


__all__ = ["LlavaNextForConditionalGenerationRBL", "LlavaNextModelRBL"]
