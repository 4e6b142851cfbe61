"""docs/models.md is what `scripts/models_table.py` makes of FAMILIES and of what tiny models measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

import models_table

from .conftest import Kit
from .tiny import CASES


PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def test_rows_of_the_page_are_measured(kit: Kit):
    """Facts do not depend on the version of transformers."""
    cells = " | ".join(models_table.row(kit))
    assert f"| {cells} |\n" in PAGE.read_text()


@pytest.mark.slow
def test_the_page_is_what_the_script_gives(kits: Callable[[str], Kit]):
    committed = PAGE.read_text()
    version = ".".join(transformers.__version__.split(".")[:2])
    if f"transformers {version};" not in committed or not all(case.installed for case in CASES.values()):
        pytest.skip(f"The page was not made with transformers {version}.")
    assert models_table.page(kits) == committed
