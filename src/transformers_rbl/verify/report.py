"""What a verification says: checks, versions, and how they are told."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch


PASSED, FAILED, SKIPPED, MEASURED = "passed", "FAILED", "skipped", "measured"


@dataclass(frozen=True)
class Check:
    """What became of one contract.

    Args:
        name (`str`): the contract, as a sentence.
        result (`str`): `"passed"`, `"FAILED"`, `"skipped"`, or `"measured"` for a timing, which cannot fail.
        figure (`str`): what was found: the largest difference and its tolerance, or why it failed or was skipped.
    """

    name: str
    result: str
    figure: str


@dataclass(frozen=True)
class Report:
    """A bug report: what was checked, where, and what became of it.

    Args:
        versions (`dict[str, str]`): packages, Python, platform, device and dtype.
        settings (`dict[str, str]`): model, codebook, picture and keep ratio.
        checks (`list[Check]`): in the order in which they ran.
    """

    versions: dict[str, str]
    settings: dict[str, str]
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.result != FAILED for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {"passed": self.passed, **asdict(self)}


def versions(device: str, dtype: str) -> dict[str, str]:
    """What a bug report has to say of an installation."""
    packages = ("transformers_rbl", "transformers", "torch", "tokenizers", "huggingface_hub")
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else ""
    return {
        **{name: _version(name) for name in packages},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device}{gpu}",
        "dtype": dtype.removeprefix("torch."),
    }


def _version(package: str) -> str:
    from transformers_rbl import __version__  # not installed where a checkout is on the path alone

    return __version__ if package == "transformers_rbl" else importlib.metadata.version(package)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
