"""Codebook pruning of visual tokens for Hugging Face LLaVA models. Importing this registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
)

from .codebook import RedundancyCodebook
from .configuration_rbl import LlavaNextRBLConfig, LlavaOnevisionRBLConfig, LlavaRBLConfig
from .modeling_llava_next_rbl import LlavaNextForConditionalGenerationRBL, LlavaNextModelRBL
from .modeling_llava_onevision_rbl import LlavaOnevisionModelRBL, LlavaOnevisionRBL
from .modeling_llava_rbl import LlavaForConditionalGenerationRBL, LlavaModelRBL
from .prompt import scatter_to_prompt
from .pruning import PruningConfig, kept_token_count


__version__ = "0.1.0"

for _config, _model, _full, _processor in (
    (LlavaRBLConfig, LlavaModelRBL, LlavaForConditionalGenerationRBL, LlavaProcessor),
    (LlavaNextRBLConfig, LlavaNextModelRBL, LlavaNextForConditionalGenerationRBL, LlavaNextProcessor),
    (LlavaOnevisionRBLConfig, LlavaOnevisionModelRBL, LlavaOnevisionRBL, LlavaOnevisionProcessor),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageTextToText.register(_config, _full, exist_ok=True)
    AutoModelForMultimodalLM.register(_config, _full, exist_ok=True)
    AutoProcessor.register(_config, _processor, exist_ok=True)

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
    "scatter_to_prompt",
]
