"""What is known so far, written down as soon as it is: a command that was killed goes on with what is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Ledger:
    """Values by key in a file of JSON lines.

    Args:
        path (`Path`): read if it is there, and appended to.
    """

    def __init__(self, path: Path):
        self.path, self.lines = path, {}
        if path.is_file():
            for line in path.read_text().splitlines():
                known = json.loads(line)
                self.lines[tuple(known["key"])] = known
        self.used: list[tuple] = []

    def get(self, key: tuple[str | float, ...], make: Callable[[], Any]) -> Any:
        """The value of a key, made and written down if it is not known; JSON types only."""
        self.used.append(key)
        if key not in self.lines:
            began = time.process_time()
            value = make()
            self.lines[key] = {"key": list(key), "seconds": round(time.process_time() - began, 3), "value": value}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(self.lines[key]) + "\n")
        return self.lines[key]["value"]

    @property
    def seconds(self) -> float:
        """CPU seconds that the values which were asked for took to make, whenever that was."""
        return sum(self.lines[key]["seconds"] for key in set(self.used))
