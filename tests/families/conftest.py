"""One kit a family: stock and pruned model of the same weights, the oracle, and three prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.models.auto_rbl import family_class
from transformers_rbl.models.seam import NEWEST_TESTED

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
        return self.load_from(self.folder, **kwargs)

    def load_from(self, source: str | Path, **kwargs: Any) -> Any:
        settings = {"codebook": self.codebook, "keep_ratio": RATIO} | kwargs
        return self.full.from_pretrained(source, **settings).eval()

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

    def answers(self, model: Any, *prompts: Prompt, **settings: Any) -> list[Answer]:
        """What `generate` says to each prompt."""
        return generated(model, self.inputs(*prompts), **settings)


@dataclass
class Answer:
    """Args: new tokens up to and with the end mark, and the logits `(n, vocabulary)` that they were chosen by."""

    tokens: list[int]
    logits: torch.Tensor


def generated(model: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> list[Answer]:
    """The answers of `generate`, one per sequence. Of beams the logits are left out: they move between rows."""
    output = model.generate(
        **inputs, **GREEDY | settings, return_dict_in_generate=True, output_logits=settings.get("num_beams", 1) == 1
    )
    rows = [until_end(row) for row in output.sequences[:, inputs["input_ids"].shape[1] :].tolist()]
    if output.logits is None:
        return [Answer(row, torch.empty(0)) for row in rows]
    logits = torch.stack(list(output.logits), 1)
    return [Answer(row, logits[i, : len(row)]) for i, row in enumerate(rows)]


def until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def same(ours: list[Answer], expected: list[Answer]) -> bool:
    """Equal tokens, and logits within 2e-4; raises with both where they are not."""
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in expected]
    for answer, other in zip(ours, expected):
        torch.testing.assert_close(answer.logits, other.logits, atol=2e-4, rtol=0)
    return True


def skip_if_refused(name: str) -> None:
    """An older transformers may have a stock class that ours refuses; the newest tested one has none."""
    try:
        family_class(name)
    except TypeError as error:
        if Version(transformers.__version__).release[:2] >= Version(NEWEST_TESTED).release[:2]:
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Kit]:
    """A family's kit, built when it is first asked for."""
    built: dict[str, Kit] = {}

    def kit(name: str) -> Kit:
        case = CASES[name]
        if not case.installed:
            pytest.skip(f"The installed transformers has no {name}, or timm, which its tower needs, is not installed.")
        if name not in built:
            skip_if_refused(name)
            built[name] = Kit(case, case.build(tmp_path_factory.mktemp(name)))
        return built[name]

    return kit


@pytest.fixture(params=[pytest.param(n, marks=() if case.core else pytest.mark.slow) for n, case in CASES.items()])
def kit(request: pytest.FixtureRequest, kits: Callable[[str], Kit]) -> Kit:
    """Every test that asks for it runs for every family."""
    return kits(request.param)
