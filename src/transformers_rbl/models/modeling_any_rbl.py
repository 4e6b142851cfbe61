"""Pruned classes of any family in FAMILIES, made from the stock ones when somebody asks for them."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from .configuration_rbl import RBLConfigMixin
from .families import FAMILIES
from .family import Family
from .features_rbl import RBLModelMixin
from .generation_rbl import RBLGenerationMixin
from .seam import ROPE, installed


@functools.cache
def make_classes(model_type: str) -> Any:
    """The full pruned class of a stock model type; `headless` and `config_class` are its attributes.

    Args:
        model_type (`str`): transformers' name of the family.

    Raises:
        ValueError: if the installed transformers has no such family, or it takes no images.
        TypeError: if its classes are not understood whole, see [`check_stock`].
    """
    stock_config, stock_full, stock_headless = stock_classes(model_type)
    names = class_names(model_type)
    config = _new(names["config"], (RBLConfigMixin, stock_config), {"model_type": f"{model_type}_rbl"})
    family = FAMILIES.get(model_type, Family(model_type, mrope=hasattr(stock_headless, ROPE)))
    headless = _new(
        names["headless"],
        (RBLModelMixin, stock_headless),
        {"config_class": config, "family": family},
        stock=stock_headless,
    )
    doc = f"{stock_full.__name__} whose language model sees only the visual tokens that a codebook keeps."
    full = _new(
        names["full"],
        (RBLGenerationMixin, stock_full),
        {"config_class": config, "__doc__": doc},
        stock=stock_full,
        headless=headless,
    )
    for made in (config, headless, full):
        setattr(sys.modules[__name__], made.__name__, made)
    register_classes(full)
    return full


def register_classes(full: Any) -> None:
    """Teach the Auto classes ours, under our model type alone: stock checkpoints stay stock."""
    config = full.config_class
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, full.headless, exist_ok=True)
    AutoModelForImageTextToText.register(config, full, exist_ok=True)
    AutoModelForMultimodalLM.register(config, full, exist_ok=True)
    processor = PROCESSOR_MAPPING.get(full.stock.config_class, None)
    if processor is not None:
        AutoProcessor.register(config, processor, exist_ok=True)


def stock_classes(model_type: str) -> tuple[Any, Any, Any]:
    """Config, full and headless class of a stock model type.

    Raises:
        ValueError: if the installed transformers has no such family, or it takes no images.
    """
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{installed()} has no {model_type} models.")
    config = CONFIG_MAPPING[model_type]
    full, headless = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(config, None), MODEL_MAPPING.get(config, None)
    if full is None or headless is None or not hasattr(headless, "get_image_features"):
        raise ValueError(f"{model_type} models of {installed()} do not encode images as pruning needs it.")
    return config, full, headless


def class_names(model_type: str) -> dict[str, str]:
    """What the classes made for a stock model type are called: `config`, `headless` and `full`."""
    config, full, headless = stock_classes(model_type)
    return {
        "config": f"{config.__name__.removesuffix('Config')}RBLConfig",
        "headless": f"{headless.__name__}RBL",
        "full": f"{full.__name__}RBL",
    }


def _new(name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> Any:
    return types.new_class(name, bases, kwargs, lambda body: body.update({"__module__": __name__, **namespace}))


def __getattr__(name: str) -> Any:
    """Classes that are not made yet (PEP 562): for `import`, pickles, and a checkpoint's `auto_map`."""
    if "RBL" in name and not name.startswith("_"):
        for model_type in FAMILIES:
            if model_type in CONFIG_MAPPING and name in class_names(model_type).values():
                make_classes(model_type)
                return vars(sys.modules[__name__])[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
