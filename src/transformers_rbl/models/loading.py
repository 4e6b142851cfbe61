"""A checkpoint loads completely, or raises: key conversion for our classes, and what counts as missing."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .codebook import RedundancyCodebook


def inherit_key_conversion(model_class: type[PreTrainedModel], stock_class: type[PreTrainedModel]) -> None:
    """Read a stock checkpoint's keys as the stock class does.

    transformers looks conversions up by class name, then by model type, and has none for ours: the keys of a Hub
    checkpoint (`language_model.model.*`) would match nothing and leave random weights behind.
    """
    stock_type, model_type = stock_class.config_class.model_type, model_class.config_class.model_type
    for ours, stock in ((model_class.__name__, stock_class.__name__), (model_type, stock_type)):
        mapping = get_checkpoint_conversion_mapping(stock)
        if mapping is not None:
            # The package and its copy as remote code may meet in one process: the second registration replaces the
            # first.
            register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


def missing_weights(model: PreTrainedModel, missing_keys: set[str] | list[str]) -> list[str]:
    """Of the weights that loading reported missing, those that a forward pass reads."""
    missing = [key for key in sorted(missing_keys) if not _is_never_read(key, model.config)]
    if missing and getattr(model, "hf_quantizer", None) is not None:
        # A quantised model has keys (scales, states) that no checkpoint of the plain one holds.
        with torch.device("meta"):
            plain = type(model)(model.config).state_dict()
        missing = [key for key in missing if key in plain]
    return missing


def check_base_model(codebook: RedundancyCodebook, base_model: str | None) -> None:
    """Raise if a codebook says that it was made for another base model."""
    if codebook.base_model and base_model and codebook.base_model != base_model:
        raise ValueError(
            f"This codebook was made for {codebook.base_model}, but the model is {base_model}. Pass check_base=False "
            "if their visual tokens are the same."
        )


def _is_never_read(key: str, config) -> bool:
    """Weights behind the hidden states that LLaVA selects: the tower's final norm, its head, and layers after the last
    used."""
    if "vision_tower." not in key:
        return False
    if re.search(r"\.(post_layernorm|head)\.", key):
        return True
    layer = re.search(r"\.encoder\.layers\.(\d+)\.", key)
    depth = getattr(config.vision_config, "num_hidden_layers", None)
    if layer is None or depth is None:
        return False
    selected = config.vision_feature_layer
    # hidden_states[i] is what layer i reads, so selecting it takes the layers before it.
    used = max(
        index if index >= 0 else depth + 1 + index for index in ([selected] if isinstance(selected, int) else selected)
    )
    return int(layer.group(1)) >= used
