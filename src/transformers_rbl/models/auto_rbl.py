"""Which pruned class belongs to a checkpoint; the Auto classes learn of ours here."""

from __future__ import annotations

import importlib
import os
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from .families import FAMILIES
from .seam import warn_if_untested


logger = logging.get_logger(__name__)

# Families with files of their own: module and full class.
NAMED = {
    "llava": ("modeling_llava_rbl", "LlavaForConditionalGenerationRBL"),
    "llava_next": ("modeling_llava_next_rbl", "LlavaNextForConditionalGenerationRBL"),
    "llava_onevision": ("modeling_llava_onevision_rbl", "LlavaOnevisionRBL"),
}


def family_class(model_type: str) -> Any:
    """The full pruned class of a family.

    Args:
        model_type (`str`): transformers' name of it, or ours (`llava_next_rbl`).

    Raises:
        ValueError: for a family that pruning does not know.
        TypeError: if the installed transformers has changed the stock class beyond what this library understands.
    """
    stock_type = model_type.removesuffix("_rbl")
    if stock_type not in NAMED:
        raise ValueError(f"Pruning does not know {model_type} models; it knows {', '.join(FAMILIES)}.")
    module, name = NAMED[stock_type]
    return getattr(importlib.import_module(f".{module}", __package__), name)


def rbl_class(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """The full pruned class for a checkpoint, stock or saved by ours.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a Hub id.
        kwargs: as in `AutoConfig.from_pretrained` (`revision`, `token`, `cache_dir`, `local_files_only`).

    Raises:
        ValueError: for a checkpoint of another architecture.
    """
    model_type = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs).model_type
    try:
        return family_class(model_type)
    except ValueError as error:
        raise ValueError(
            f"{pretrained_model_name_or_path} is a {model_type} model; pruning knows {', '.join(FAMILIES)}."
        ) from error


def register() -> None:
    """Under our model types alone: stock checkpoints stay stock."""
    warn_if_untested()
    for stock_type in NAMED:
        try:
            full = family_class(stock_type)
        except TypeError as error:  # one family that transformers has changed; importing its class says so again
            logger.warning(str(error))
            continue
        config = full.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, full.headless, exist_ok=True)
        AutoModelForImageTextToText.register(config, full, exist_ok=True)
        AutoModelForMultimodalLM.register(config, full, exist_ok=True)
        AutoProcessor.register(config, PROCESSOR_MAPPING[full.stock.config_class], exist_ok=True)


__all__ = ["rbl_class"]
