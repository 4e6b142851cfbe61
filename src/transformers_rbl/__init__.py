"""Codebook pruning of visual tokens for Hugging Face LLaVA models. Importing this registers the Auto classes."""

from .models.auto_rbl import rbl_class, register
from .models.codebook import RedundancyCodebook
from .models.configuration_rbl import LlavaNextRBLConfig, LlavaOnevisionRBLConfig, LlavaRBLConfig
from .models.modeling_llava_next_rbl import LlavaNextForConditionalGenerationRBL, LlavaNextModelRBL
from .models.modeling_llava_onevision_rbl import LlavaOnevisionModelRBL, LlavaOnevisionRBL
from .models.modeling_llava_rbl import LlavaForConditionalGenerationRBL, LlavaModelRBL
from .models.prompt import scatter_to_prompt
from .models.pruning import PruningConfig, kept_token_count
from .moved import add_aliases


__version__ = "0.1.0"

register()
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
    "scatter_to_prompt",
]
