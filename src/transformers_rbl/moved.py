"""Modules that lay elsewhere in 0.1.0: their old names still import, and look each name up where it lies now."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType


# Old module -> the modules that hold its names now, in the order in which they are asked.
MOVED = {
    "auto_rbl": ["models.auto_rbl"],
    "cards": ["hub.cards"],
    "codebook": ["models.codebook"],
    "configuration_rbl": ["models.configuration_rbl"],
    "features_rbl": ["models.features_rbl", "models.llava_family"],
    "generation_rbl": ["models.generation_rbl"],
    "hub": ["hub.push", "models.loading"],  # a package today, which asks this table itself
    "loading": ["models.loading"],
    "modeling_llava_next_rbl": ["models.modeling_llava_next_rbl"],
    "modeling_llava_onevision_rbl": ["models.modeling_llava_onevision_rbl"],
    "modeling_llava_rbl": ["models.modeling_llava_rbl"],
    "modeling_rbl": ["models.modeling_rbl", "models.seam", "models.memory"],
    "prompt": ["models.prompt", "models.memory", "models.positions"],
    "pruning": ["models.pruning", "models.scorers", "models.layout"],
    "publish": ["hub.publish"],
}


def forward(old: str):
    """The `__getattr__` of the old module `old` (PEP 562): nothing is imported before a name is asked for."""

    def lookup(name: str):
        # `inspect` asks every module in sys.modules for `__file__` and the like: an alias has none.
        if not name.startswith("__"):
            for place in MOVED[old]:
                module = import_module(f"{__package__}.{place}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"module '{__package__}.{old}' has no attribute '{name}'")

    return lookup


def add_aliases() -> None:
    """Put every old name that is free into `sys.modules`, and on the package."""
    package = sys.modules[str(__package__)]
    for old in MOVED.keys() - {"hub"}:
        alias = ModuleType(f"{__package__}.{old}", f"Moved to {', '.join(MOVED[old])}.")
        alias.__spec__ = ModuleSpec(alias.__name__, loader=None)
        alias.__getattr__ = forward(old)
        sys.modules[alias.__name__] = alias
        setattr(package, old, alias)
