"""Codebook pruning of visual tokens for Hugging Face vision-language models. Importing this registers the Auto classes.

Names are imported when they are first used (PEP 562), torch and transformers with them, and the pruned classes of any
family in FAMILIES are made then: `from transformers_rbl import Qwen3VLForConditionalGenerationRBL`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .moved import add_aliases
from .registration import register_with_transformers


if TYPE_CHECKING:
    from .models.auto_rbl import rbl_class
    from .models.codebook import RedundancyCodebook
    from .models.configuration_rbl import LlavaNextRBLConfig, LlavaOnevisionRBLConfig, LlavaRBLConfig
    from .models.modeling_llava_next_rbl import LlavaNextForConditionalGenerationRBL, LlavaNextModelRBL
    from .models.modeling_llava_onevision_rbl import LlavaOnevisionModelRBL, LlavaOnevisionRBL
    from .models.modeling_llava_rbl import LlavaForConditionalGenerationRBL, LlavaModelRBL
    from .models.prompt import scatter_to_prompt
    from .models.pruning import PruningConfig, kept_token_count
    from .models.scorers import register_scorer

__version__ = "0.2.0.dev0"

# Public name -> the file of models/ that holds it.
_PLACES = {
    "LlavaForConditionalGenerationRBL": "modeling_llava_rbl",
    "LlavaModelRBL": "modeling_llava_rbl",
    "LlavaNextForConditionalGenerationRBL": "modeling_llava_next_rbl",
    "LlavaNextModelRBL": "modeling_llava_next_rbl",
    "LlavaNextRBLConfig": "configuration_rbl",
    "LlavaOnevisionModelRBL": "modeling_llava_onevision_rbl",
    "LlavaOnevisionRBL": "modeling_llava_onevision_rbl",
    "LlavaOnevisionRBLConfig": "configuration_rbl",
    "LlavaRBLConfig": "configuration_rbl",
    "PruningConfig": "pruning",
    "RedundancyCodebook": "codebook",
    "family_class": "auto_rbl",
    "kept_token_count": "pruning",
    "rbl_class": "auto_rbl",
    "register": "auto_rbl",
    "register_scorer": "scorers",
    "scatter_to_prompt": "prompt",
}

register_with_transformers()
add_aliases()

__all__ = [
    "LlavaForConditionalGenerationRBL",
    "LlavaModelRBL",
    "LlavaNextForConditionalGenerationRBL",
    "LlavaNextModelRBL",
    "LlavaNextRBLConfig",
    "LlavaOnevisionModelRBL",
    "LlavaOnevisionRBL",
    "LlavaOnevisionRBLConfig",
    "LlavaRBLConfig",
    "PruningConfig",
    "RedundancyCodebook",
    "kept_token_count",
    "rbl_class",
    "register_scorer",
    "scatter_to_prompt",
]


def __getattr__(name: str) -> Any:
    """Public names, and pruned classes of any family."""
    if name in _PLACES:
        public = getattr(import_module(f".models.{_PLACES[name]}", __package__), name)
        model_type = getattr(getattr(public, "config_class", public), "model_type", None)
        if model_type is not None:
            import_module(".models.auto_rbl", __package__).family_class(model_type)  # with its Auto classes
        return public
    if "RBL" in name and not name.startswith("_"):
        return getattr(import_module(".models.modeling_any_rbl", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
