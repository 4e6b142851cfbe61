"""LLaVA-1.5 with pruned visual tokens."""

from transformers import LlavaForConditionalGeneration, LlavaModel

from .configuration_rbl import LlavaRBLConfig
from .families import FAMILIES
from .features_rbl import RBLModelMixin
from .generation_rbl import RBLGenerationMixin


class LlavaModelRBL(RBLModelMixin, LlavaModel, stock=LlavaModel):
    """The headless model. See [`LoadingMixin.from_pretrained`] for what loading takes."""

    config_class = LlavaRBLConfig
    family = FAMILIES["llava"]


class LlavaForConditionalGenerationRBL(
    RBLGenerationMixin,
    LlavaForConditionalGeneration,
    stock=LlavaForConditionalGeneration,
    headless=LlavaModelRBL,
):
    """LLaVA-1.5 (CLIP, SigLIP, Pixtral) whose language model sees only the visual tokens that a codebook keeps.

    Use it as `LlavaForConditionalGeneration`; see [`LoadingMixin.from_pretrained`] for the codebook and settings.
    """

    config_class = LlavaRBLConfig


__all__ = ["LlavaForConditionalGenerationRBL", "LlavaModelRBL"]
