"""Codebook pruning of visual tokens for Hugging Face LLaVA models. Importing this registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    LlavaNextProcessor,
)

from .codebook import RedundancyCodebook
from .configuration_rbl import LlavaNextRBLConfig
from .modeling_llava_next_rbl import LlavaNextForConditionalGenerationRBL, LlavaNextModelRBL
from .prompt import scatter_to_prompt
from .pruning import PruningConfig, kept_token_count


__version__ = "0.1.0"

for _config, _model, _full, _processor in (
    (LlavaNextRBLConfig, LlavaNextModelRBL, LlavaNextForConditionalGenerationRBL, LlavaNextProcessor),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageTextToText.register(_config, _full, exist_ok=True)
    AutoModelForMultimodalLM.register(_config, _full, exist_ok=True)
    AutoProcessor.register(_config, _processor, exist_ok=True)

__all__ = [
    "LlavaNextForConditionalGenerationRBL",
    "LlavaNextModelRBL",
    "LlavaNextRBLConfig",
    "PruningConfig",
    "RedundancyCodebook",
    "kept_token_count",
    "scatter_to_prompt",
]
