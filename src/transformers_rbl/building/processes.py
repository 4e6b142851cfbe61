"""This process among those that `accelerate launch` started."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch


if TYPE_CHECKING:
    from accelerate import PartialState

Item = TypeVar("Item")


class Processes:
    """This process among those that `accelerate launch` started; alone without it.

    Raises:
        ValueError: if there are several and accelerate is missing.
    """

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self._state: PartialState | None = None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            try:
                from accelerate import PartialState
            except ImportError as error:
                raise ValueError("Several processes need accelerate: pip install transformers_rbl[build].") from error
            # A process that is done waits for the slowest one, which may take hours.
            self._state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
            self.index, self.count = self._state.process_index, self._state.num_processes

    @property
    def device(self) -> str:
        """Where this process computes."""
        if self._state is not None:
            return str(self._state.device)
        return "cuda" if torch.cuda.is_available() else "cpu"

    def wait(self) -> None:
        """Go on when every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def gather(self, items: list[Item]) -> list[Item]:
        """All processes' lists, in the order of processes."""
        if self._state is None:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def end(self) -> None:
        """Leave the process group; nothing can be gathered afterwards."""
        if self._state is not None:
            self._state.destroy_process_group()
