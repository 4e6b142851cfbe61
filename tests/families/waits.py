"""Where the host asks the device for a value, told on a CPU: by the operators and methods that have to.

On a GPU each of these makes Python wait until all that was launched before has run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


# Operators whose answer, or its size, the host needs at once.
ASKING = {
    "nonzero", "nonzero_numpy", "argwhere", "masked_select", "_local_scalar_dense", "item", "is_nonzero", "equal",
    "allclose", "bincount", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
    "repeat_interleave",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Methods that copy to the host; on a CPU they reach no operator.
COPYING = {"tolist", "cpu", "numpy", "__array__"}


@dataclass(frozen=True)
class Wait:
    """Args: operator or method, and the place in transformers_rbl or transformers that called it."""

    name: str
    file: str
    function: str
    line: int

    @property
    def is_ours(self) -> bool:
        return self.file.startswith("transformers_rbl/")

    @classmethod
    def here(cls, name: str) -> Wait:
        frame = sys._getframe(2)
        while frame is not None:
            for package in ("transformers_rbl/", "transformers/"):
                path, found, file = frame.f_code.co_filename.rpartition(f"/{package}")
                if found and path:
                    return cls(name, package + file, frame.f_code.co_name, frame.f_lineno)
            frame = frame.f_back
        return cls(name, "elsewhere", "", 0)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: list[Wait]):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ASKING or (name in INDEXING and any(_is_mask(index) for index in args[1])):
            self.waits.append(Wait.here(name))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, waits: list[Wait]):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in COPYING and args and isinstance(args[0], torch.Tensor):
            self.waits.append(Wait.here(name))
        if name in ("tensor", "as_tensor") and kwargs.get("device") is not None:
            self._transfer(name)
        to_device = kwargs.get("device") is not None or any(isinstance(arg, (torch.device, str)) for arg in args[1:])
        if name == "to" and to_device and not kwargs.get("non_blocking"):
            self._transfer("to")
        return func(*args, **kwargs)

    def _transfer(self, name: str) -> None:
        """Of ours alone: stock moves what is on the device already, and on a CPU that looks the same."""
        wait = Wait.here(name)
        if wait.is_ours:
            self.waits.append(wait)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


@contextmanager
def watched(model: Any) -> Iterator[list[Wait]]:
    """Waits between the end of the model's last projector and the first layer of its language model.

    Args:
        model: full or headless. It runs once in this context.
    """
    headless, waits, modes = model.base_model, [], []
    projector = headless.get_submodule(model.family.projector)

    def stop(*_: Any) -> None:
        while modes:
            modes.pop().__exit__(None, None, None)

    def start(*_: Any) -> None:
        stop()  # another projector: images, then videos
        for mode in (_Operators(waits), _Methods(waits)):
            modes.append(mode)
            mode.__enter__()

    layers = model.get_decoder().layers
    hooks = [projector.register_forward_hook(start), layers[0].register_forward_pre_hook(stop)]
    try:
        yield waits
        assert not modes, "the language model did not run"
    finally:
        stop()
        for hook in hooks:
            hook.remove()
