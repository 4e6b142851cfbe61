"""Which pruned class belongs to a checkpoint; the Auto classes learn of ours here."""

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

from .modeling_llava_next_rbl import LlavaNextForConditionalGenerationRBL
from .modeling_llava_onevision_rbl import LlavaOnevisionRBL
from .modeling_llava_rbl import LlavaForConditionalGenerationRBL


PROCESSORS = {
    LlavaForConditionalGenerationRBL: LlavaProcessor,
    LlavaNextForConditionalGenerationRBL: LlavaNextProcessor,
    LlavaOnevisionRBL: LlavaOnevisionProcessor,
}


def rbl_class(pretrained_model_name_or_path, **kwargs):
    """The full pruned class for a checkpoint, stock or saved by ours.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a Hub id.
        kwargs: as in `AutoConfig.from_pretrained` (`revision`, `token`, `cache_dir`, `local_files_only`).

    Raises:
        ValueError: for a checkpoint of another architecture.
    """
    found = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs).model_type
    for full in PROCESSORS:
        if found in full.config_class.model_types():
            return full
    known = ", ".join(full.config_class.stock_model_type() for full in PROCESSORS)
    raise ValueError(f"{pretrained_model_name_or_path} is a {found} model; pruning knows {known}.")


def register() -> None:
    """Under our model types alone: stock checkpoints stay stock."""
    for full, processor in PROCESSORS.items():
        config = full.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, full.headless, exist_ok=True)
        AutoModelForImageTextToText.register(config, full, exist_ok=True)
        AutoModelForMultimodalLM.register(config, full, exist_ok=True)
        AutoProcessor.register(config, processor, exist_ok=True)


__all__ = ["rbl_class"]
