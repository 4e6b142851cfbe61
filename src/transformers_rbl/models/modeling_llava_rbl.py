"""LLaVA-1.5 with pruned visual tokens."""

from transformers import LlavaForConditionalGeneration, LlavaModel

from .configuration_rbl import LlavaRBLConfig
from .features_rbl import RBLModelMixin
from .generation_rbl import RBLGenerationMixin


class LlavaModelRBL(RBLModelMixin, LlavaModel, stock=LlavaModel):
    """The headless model. See [`RBLMixin.from_pretrained`] for what loading takes."""

    config_class = LlavaRBLConfig

    def _tile_lengths(self, call: dict) -> list[int]:
        if call.get("image_sizes") is None:
            return super()._tile_lengths(call)
        # Pixtral's tower takes images of any size; row ends are text there.
        return [int(h) // self.vision_tower.patch_size * (int(w) // self.vision_tower.patch_size)
                for h, w in call["image_sizes"]]  # fmt: skip


class LlavaForConditionalGenerationRBL(
    RBLGenerationMixin,
    LlavaForConditionalGeneration,
    stock=LlavaForConditionalGeneration,
    headless=LlavaModelRBL,
):
    """LLaVA-1.5 whose language model sees only the visual tokens that a codebook keeps.

    Use it as `LlavaForConditionalGeneration`; see [`RBLMixin.from_pretrained`] for the codebook and settings.
    """

    config_class = LlavaRBLConfig


__all__ = ["LlavaForConditionalGenerationRBL", "LlavaModelRBL"]
