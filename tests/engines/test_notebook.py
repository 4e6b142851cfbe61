"""The notebook on serving runs again. In the environment of `make_environment.sh`."""

from pathlib import Path

import pytest


pytest.importorskip("vllm", reason="needs vLLM: tests/engines/make_environment.sh makes an environment with it")

import nbformat
from nbclient import NotebookClient


NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"


def test_the_notebook_on_serving_runs_again():
    book = nbformat.read(NOTEBOOKS / "serve.ipynb", as_version=4)
    committed = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in book.cells]
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    said = ["".join(o.get("text", "") for o in c.get("outputs", ()) if o.get("name") == "stdout") for c in book.cells]
    for now, then in zip(said, committed, strict=True):
        assert now.count("tokens") == then.count("tokens")
