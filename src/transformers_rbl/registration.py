"""transformers learns our model types as soon as its Auto classes are there, so that importing this package waits for
nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


AUTO = "transformers.models.auto.configuration_auto"  # the module of `AutoConfig`, which every Auto class asks


def register_with_transformers() -> None:
    """Now where `AutoConfig` is imported already, else right after it is, by whomever."""
    if AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterAutoConfig) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAutoConfig())


def _register() -> None:
    from .models.auto_rbl import register

    register()


class _AfterAutoConfig:
    """A finder (PEP 451) that finds one module, as the path finder would, and registers once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == AUTO else None
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = execute_and_register
        return spec
