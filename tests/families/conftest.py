"""One kit a family: stock and pruned model of the same weights, the oracle, and three prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.models.auto_rbl import family_class

from .oracle import Oracle
from .tiny import CASES, EOS, SPECIAL, WIDTH, Case, Picture, Prompt, words


RATIO = 0.4
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": SPECIAL}
ALL, OFF = PruningConfig(keep_ratio=1.0), PruningConfig(enabled=False)


@dataclass
class Kit:
    """Models are shared by tests: never change them."""

    case: Case
    folder: Path

    @property
    def name(self) -> str:
        return self.case.model_type

    @property
    def full(self) -> Any:
        """Our full class."""
        return family_class(self.name)

    @cached_property
    def codebook(self) -> RedundancyCodebook:
        return RedundancyCodebook(torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0)))

    def load(self, **kwargs: Any) -> Any:
        """A pruned model of its own."""
        return self.full.from_pretrained(self.folder, **{"codebook": self.codebook, "keep_ratio": RATIO} | kwargs).eval()

    @cached_property
    def stock(self) -> Any:
        return self.case.stock.from_pretrained(self.folder).eval()

    @cached_property
    def model(self) -> Any:
        return self.load()

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.case, self.stock, self.codebook.prototypes)

    @cached_property
    def pictures(self) -> list[Picture]:
        return self.case.pictures()

    @cached_property
    def one(self) -> Prompt:
        """A prompt with one image."""
        return [words(4), self.pictures[0], words(5, 1)]

    @cached_property
    def two(self) -> Prompt:
        """A prompt with two images, unlike the one of `one` in length."""
        return [words(3, 2), self.pictures[1], words(2, 3), self.pictures[2], words(4, 4)]

    @cached_property
    def text(self) -> Prompt:
        """A prompt without image."""
        return [words(6, 5)]

    def inputs(self, *prompts: Prompt) -> dict[str, torch.Tensor]:
        return self.case.inputs(list(prompts))

    def answers(self, model: Any, *prompts: Prompt, **settings: Any) -> list[list[int]]:
        """What `generate` adds to each prompt, up to and with the end mark."""
        inputs = self.inputs(*prompts)
        with torch.no_grad():
            sequences = model.generate(**inputs, **GREEDY | settings)
        return answers_of(sequences, inputs["input_ids"].shape[1])


def answers_of(sequences: torch.Tensor, length: int) -> list[list[int]]:
    """What stands behind `length` columns, up to and with the end mark."""
    rows = sequences[:, length:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kit]:
    """A family's kit, built when it is first asked for."""
    built: dict[str, Kit] = {}

    def kit(name: str) -> Kit:
        case = CASES[name]
        if not case.installed:
            pytest.skip(f"The installed transformers has no {name}.")
        if name not in built:
            built[name] = Kit(case, case.build(tmp_path_factory.mktemp(name)))
        return built[name]

    return kit


@pytest.fixture(params=[pytest.param(n, marks=() if case.core else pytest.mark.slow) for n, case in CASES.items()])
def kit(request: pytest.FixtureRequest, kits: Callable[[str], Kit]) -> Kit:
    """Every test that asks for it runs for every family."""
    return kits(request.param)
