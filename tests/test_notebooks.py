"""The notebooks of docs/notebooks: what is committed was run, and runs again (`-m slow`; `serve` in tests/engines)."""

from pathlib import Path

import nbformat
import pytest


NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))


def read(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert NAMES == ["build", "prune", "retention", "serve"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_was_run_in_order_without_noise(name):
    path, book = NOTEBOOKS / f"{name}.ipynb", read(name)
    nbformat.validate(book)
    assert path.stat().st_size < 300_000
    assert [cell.execution_count for cell in code(book)] == list(range(1, len(code(book)) + 1))
    outputs = [output for cell in code(book) for output in cell.outputs]
    assert outputs and {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "serve"])
def test_it_runs_again(name):
    from nbclient import NotebookClient

    book = read(name)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    assert [len(cell.outputs) > 0 for cell in code(book)] == [len(cell.outputs) > 0 for cell in code(read(name))]
