"""Configs of the pruned models: the stock config, plus the pruning settings and the shape of the codebook."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig

from .pruning import PruningConfig
from .seam import BESIDE_LOGITS


Mixed: Any = object  # a stock config, when a family's config is made


@dataclass(kw_only=True, repr=False, eq=False, init=False)  # so that the configs below inherit these fields
class RBLConfigMixin(Mixed):
    """What a pruned model's config adds to the stock one.

    Args:
        pruning (`dict`, *optional*): fields of [`PruningConfig`]; None leaves the model as the stock one.
        num_prototypes (`int`, *optional*): rows of the codebook in the checkpoint; None if it has none.
        codebook (`dict`, *optional*): what that codebook knows of itself (base model, recommended settings, how it was
            built).
        base_model (`str`, *optional*): Hub id of the stock checkpoint that the weights come from.
        full_length_logits (`bool`, defaults to `False`): `forward` returns logits (of headless models,
            `last_hidden_state`) at the length of the original prompt, where dropped positions repeat the last kept one
            before them, instead of compact ones. Costs memory; for code that pairs them with its own full-length
            labels, such as `Trainer` with label smoothing, and TRL's trainers.
    """

    # Trainer gathers every other output as a prediction: the logits stay, then the labels that belong to them.
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(BESIDE_LOGITS)

    pruning: dict | None = None
    num_prototypes: int | None = None
    codebook: dict | None = None
    base_model: str | None = None
    full_length_logits: bool = False

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As stock, but a stock checkpoint's model type becomes this class's: reading one here is the normal path."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type")
        if model_type == cls.stock_model_type():
            config_dict = {**config_dict, "model_type": cls.model_type}
        elif model_type != cls.model_type and model_type in _known_model_types():
            raise ValueError(
                f"{pretrained_model_name_or_path} is a {model_type} checkpoint, not {cls.stock_model_type()}: "
                "transformers_rbl.rbl_class(…) names the class for it."
            )
        return config_dict, kwargs

    @classmethod
    def stock_model_type(cls) -> str:
        return cls.model_type.removesuffix("_rbl")

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if isinstance(self.pruning, PruningConfig):
            output["pruning"] = self.pruning.to_dict()
        return output


class LlavaRBLConfig(RBLConfigMixin, LlavaConfig):
    model_type = "llava_rbl"


class LlavaNextRBLConfig(RBLConfigMixin, LlavaNextConfig):
    model_type = "llava_next_rbl"


class LlavaOnevisionRBLConfig(RBLConfigMixin, LlavaOnevisionConfig):
    model_type = "llava_onevision_rbl"


def _known_model_types() -> set[str]:
    return {name for made in RBLConfigMixin.__subclasses__() for name in (made.model_type, made.stock_model_type())}


__all__ = ["LlavaNextRBLConfig", "LlavaOnevisionRBLConfig", "LlavaRBLConfig"]
