"""The command line itself: how it starts, and how it ends on bad input. What the commands do is tested beside what they
use."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import transformers_rbl
from transformers_rbl.cli import app


def test_the_version_is_the_packages():
    command = [sys.executable, "-m", "transformers_rbl.cli", "--version"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == f"transformers_rbl {transformers_rbl.__version__}\n"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("build --out @/book", "Give --model and --images to probe"),
        ("build --out @/book --model @ --from-records @", "Give --model and --images to probe"),
        ("build --out @/book --model @", "--model needs --images and --recipe"),
        ("build --out @/book --model @ --keep-ratio 2", "(0, 1]; got 2.0"),
        ("build --out @/book --from-records @ --threshold inf", "threshold must be finite"),
        ("inspect @/missing", "no folder with a codebook"),
        ("evaluate --model @ --data @ --out @ --metric exact --metric bleu", "not bleu."),
        ("evaluate --model @ --data @ --out @ --dtype float8", "--dtype is auto, float32, bfloat16 or float16"),
        ("evaluate --model @ --data @ --out @ --device nowhere", "--device nowhere: "),
        ("evaluate --model @ --data @ --out @ --tiles some", "tiles must be one of all, base"),
        ("calibrate --model @", "Give --images (unlabelled) or --data"),
        ("calibrate --model @ --images @ --data @", "Give --images (unlabelled) or --data"),
        ("calibrate --model @ --images @ --share 2", "(0, 1]; got 2.0"),
        ("calibrate --model @ --images @ --write", "--write needs --codebook, a folder"),
        ("convert @/missing.pt @/book", "missing.pt"),
        ("publish @ org/name", "has no README.md: a Hub repository opens with its card"),
        ("demo --model @ --device nowhere", "--device nowhere: "),
    ],
)
def test_bad_input_ends_with_one_sentence(tmp_path, command, words):
    result = CliRunner().invoke(app, command.replace("@", str(tmp_path)).split())
    lines = [line for line in result.stderr.splitlines() if line.startswith("rbl: ")]
    assert result.exit_code == 2 and len(lines) == 1 and words in lines[0], result.output
    assert "Traceback" not in result.output and not (tmp_path / "book").exists()


def test_the_demo_says_that_it_needs_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "transformers_rbl.demo.page", raising=False)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2 and "pip install transformers_rbl[demo]" in result.stderr
