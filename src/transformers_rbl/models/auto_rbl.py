"""Which pruned class belongs to a checkpoint; the Auto classes learn of ours here.

The Auto classes are imported inside functions: this file is read right after `AutoConfig` is (see `registration.py`).
"""

from __future__ import annotations

import difflib
import importlib
import os
from types import ModuleType
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from .families import FAMILIES
from .names import check_checkpoint
from .seam import warn_if_untested


# Families with files of their own: module and full class.
NAMED = {
    "llava": ("modeling_llava_rbl", "LlavaForConditionalGenerationRBL"),
    "llava_next": ("modeling_llava_next_rbl", "LlavaNextForConditionalGenerationRBL"),
    "llava_onevision": ("modeling_llava_onevision_rbl", "LlavaOnevisionRBL"),
}


def family_class(model_type: str, allow_untested: bool = False) -> Any:
    """The full pruned class of a family.

    Args:
        model_type (`str`): transformers' name of it, or ours (`llava_next_rbl`).
        allow_untested (`bool`, defaults to `False`): try a family that this library is not tested with.

    Raises:
        ValueError: for a family that pruning does not know, or that the installed transformers lacks.
        TypeError: if the installed transformers has changed the stock class beyond what this library understands.
    """
    stock_type = model_type.removesuffix("_rbl")
    if stock_type in NAMED:
        module, name = NAMED[stock_type]
        full = getattr(_module(module), name)
        _module("modeling_any_rbl").register_classes(full)
        return full
    if stock_type not in FAMILIES and not allow_untested:
        near = difflib.get_close_matches(stock_type, FAMILIES, n=1)
        raise ValueError(
            f"Pruning is not tested with {stock_type} models{f' (it is with {near[0]})' if near else ''}; it knows "
            f"{', '.join(FAMILIES)}. allow_untested=True tries."
        )
    return _module("modeling_any_rbl").make_classes(stock_type)


def rbl_class(pretrained_model_name_or_path: str | os.PathLike, *, allow_untested: bool = False, **kwargs: Any) -> Any:
    """The full pruned class for a checkpoint, stock or saved by ours.

    Args:
        pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a Hub id.
        allow_untested (`bool`, defaults to `False`): try a family that this library is not tested with.
        kwargs: as in `AutoConfig.from_pretrained` (`revision`, `token`, `cache_dir`, `local_files_only`).

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: for a checkpoint of a family that pruning does not know.
    """
    from transformers import AutoConfig

    if not kwargs.get("subfolder"):
        known = {name: kwargs[name] for name in ("cache_dir", "local_files_only") if name in kwargs}
        check_checkpoint(pretrained_model_name_or_path, **known)
    try:
        model_type = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs).model_type
    except OSError as error:  # without a connection, transformers names no checkpoint
        if str(pretrained_model_name_or_path) in str(error):
            raise
        raise OSError(f"{pretrained_model_name_or_path} is no folder here. {error}") from error
    try:
        return family_class(model_type, allow_untested)
    except ValueError as error:
        raise ValueError(f"{pretrained_model_name_or_path} is a {model_type} model. {error}") from error


def register() -> None:
    """Teach `AutoConfig` the model types of all families; their classes are made when a config of theirs is read."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    warn_if_untested()
    for stock_type in FAMILIES:
        name = f"{stock_type}_rbl"
        if name not in CONFIG_MAPPING:
            AutoConfig.register(name, type("DeferredRBLConfig", (_Deferred,), {"model_type": name}))


def _module(name: str) -> ModuleType:
    """A file beside this one, imported when it is needed."""
    return importlib.import_module(f".{name}", __package__)


class _Deferred(PreTrainedConfig):
    """Stands for a family's config class, so that importing this library does not import thirty model files."""

    def __new__(cls, *args: Any, **kwargs: Any):
        return family_class(cls.model_type).config_class(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return family_class(cls.model_type).config_class.from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        return family_class(cls.model_type).config_class.from_pretrained(pretrained_model_name_or_path, **kwargs)


__all__ = ["family_class", "rbl_class"]
