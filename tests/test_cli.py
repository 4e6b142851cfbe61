"""The command line itself: how it starts, and how it ends on bad input. What the commands do is tested beside what they
use."""

import io
import socket
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from typer.testing import CliRunner

import transformers_rbl
from transformers_rbl import RedundancyCodebook
from transformers_rbl.cli import app
from transformers_rbl.hub.cards import codebook_card, save_with_card


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
        ("inspect outputs.json", "no folder with a codebook, nor a Hub id"),
        (
            "evaluate --model ./none --data @/q.jsonl --out @/book",
            "./none is no folder with a checkpoint, nor a Hub id",
        ),
        ("verify @", "has no config.json: it holds no checkpoint"),
        ("evaluate --model @ --data @/q.jsonl --out @/q.jsonl", "q.jsonl is a file: give a folder to write to"),
        ("build --out @/q.jsonl/book --model @ --images @ --recipe digits", "Nothing can be written to"),
        ("convert @/x.json @/book", "x.json is JSON: the codebook is the .pt beside it"),
        ("convert @/missing.pt @/book --keep-ratio 7", "--keep-ratio: keep_ratio is the share"),
        ("convert @/missing.pt @/book --threshold nan", "--threshold: threshold must be finite"),
        ("publish @ a/b/c --dry-run", "'a/b/c' is no repository's name"),
        ("publish @ org/ö --dry-run", "is no repository's name"),
        ("evaluate --model @ --data @ --out @ --metric exact --metric bleu", "not bleu."),
        ("evaluate --model @ --data @ --out @ --dtype float8", "--dtype is auto, float32, bfloat16 or float16"),
        (
            "evaluate --model @ --data @ --out @ --device cuda:99",
            "--device cuda:99 cannot be had: this machine has cpu",
        ),
        ("evaluate --model @ --data @ --out @ --tiles some", "tiles must be one of all, base"),
        ("calibrate --model @", "Give --images (unlabelled) or --data"),
        ("calibrate --model @ --images @ --data @", "Give --images (unlabelled) or --data"),
        ("calibrate --model @ --images @ --share 2", "(0, 1]; got 2.0"),
        ("calibrate --model @ --images @ --write", "--write needs --codebook, a folder"),
        ("convert @/missing.pt @/book", "missing.pt"),
        ("publish @ org/name", "has no README.md: a Hub repository opens with its card"),
        ("demo --device nowhere", "--device nowhere cannot be had: this machine has cpu"),
        ("demo --device meta", "--device meta cannot be had: this machine has cpu"),
    ],
)
def test_bad_input_ends_with_one_sentence(tmp_path, command, words):
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "?", "answer": "x"}\n')
    (tmp_path / "x.json").write_text('["1", "2"]')
    result = CliRunner().invoke(app, command.replace("@", str(tmp_path)).split())
    lines = [line for line in result.stderr.splitlines() if line.startswith("rbl: ")]
    assert result.exit_code == 2 and len(lines) == 1 and words in lines[0], result.output
    assert "Traceback" not in result.output and not (tmp_path / "book").exists()


def test_the_demo_says_that_it_needs_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "transformers_rbl.demo.page", raising=False)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 2 and "pip install transformers_rbl[demo]" in result.stderr


def run(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [str(item) for item in arguments])


def authors_file(folder, rows=5):
    torch.save(torch.randn(rows, 8, generator=torch.Generator().manual_seed(rows)), folder / "authors.pt")
    return folder / "authors.pt"


def test_a_converted_codebook_has_the_card_that_publish_wants(tmp_path):
    assert run("convert", authors_file(tmp_path), tmp_path / "book").exit_code == 0
    result = run("publish", tmp_path / "book", "org/book", "--dry-run")
    assert result.exit_code == 0 and "README.md" in result.output, result.output


def test_files_of_an_earlier_run_are_replaced_when_asked_for_alone(tmp_path):
    file, book = authors_file(tmp_path), tmp_path / "book"
    assert run("convert", file, book).exit_code == 0
    before = {path.name: path.read_bytes() for path in book.iterdir()}
    other = authors_file(tmp_path, rows=6)
    refused = run("convert", other, book)
    assert refused.exit_code == 2 and "codebook.json, codebook.safetensors already" in refused.stderr
    assert "--overwrite" in refused.stderr and {path.name: path.read_bytes() for path in book.iterdir()} == before
    assert run("convert", other, book, "--overwrite").exit_code == 0
    assert "6 x 8" in (book / "README.md").read_text()  # the card is ours, and follows


@pytest.mark.parametrize(
    ("command", "there"),
    [
        ("build --out @ --model @ --images @ --recipe digits", "codebook.safetensors"),
        ("build --out @ --model @ --images @ --recipe digits", "report.md"),
        ("evaluate --out @ --model @ --data @/q.jsonl", "results.md"),
        ("evaluate --out @ --model @ --data @/q.jsonl", "accuracy.png"),
        ("inspect @ --images @ --sheet @/sheet.png", "sheet.png"),
    ],
)
def test_what_is_there_is_refused_before_anything_is_loaded(tmp_path, command, there):
    (tmp_path / there).write_text("mine")
    result = run(*command.replace("@", str(tmp_path)).split())
    assert result.exit_code == 2 and there in result.stderr and "already" in result.stderr, result.output
    assert "--overwrite" in result.stderr and (tmp_path / there).read_text() == "mine"


def test_a_readme_of_somebody_elses_stays_whatever_is_asked_for(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "README.md").write_text("mine")
    for options in ((), ("--overwrite",)):
        result = run("convert", authors_file(tmp_path), tmp_path / "book", *options)
        assert result.exit_code == 0 and "stays as it was" in result.output, result.output
        assert (tmp_path / "book" / "README.md").read_text() == "mine"


def test_a_card_that_was_edited_stays(tmp_path):
    book = RedundancyCodebook(torch.randn(3, 4), recommended_keep_ratio=0.2)
    assert save_with_card(book, tmp_path)
    book.recommended_keep_ratio = 0.3
    assert save_with_card(book, tmp_path) and (tmp_path / "README.md").read_text() == codebook_card(book).content
    with (tmp_path / "README.md").open("a") as file:
        file.write("and thanks to my cat\n")
    book.recommended_keep_ratio = 0.4
    assert not save_with_card(book, tmp_path) and "0.3" in (tmp_path / "README.md").read_text()


def test_the_pad_tokens_embedding_is_no_codebook(tmp_path):
    result = run("convert", authors_file(tmp_path, rows=1), tmp_path / "book")
    assert result.exit_code == 2 and "one row, as the pad token's embedding" in result.stderr
    assert not (tmp_path / "book").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("build --out @/out --model @ --images @ --recipe digits", "run the same command to go on"),
        ("convert @/authors.pt @/out", "Nothing was written"),
    ],
)
def test_ctrl_c_says_what_is_left(tmp_path, monkeypatch, command, words):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_rbl.building.images.ImageSource.__init__", stop)
    monkeypatch.setattr("transformers_rbl.building.upstream.torch.load", stop)
    authors_file(tmp_path)
    result = run(*command.replace("@", str(tmp_path)).split())
    assert result.exit_code == 130 and words in result.stderr and "Aborted" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers_rbl.models.codebook.save_file", full)
    result = run("convert", authors_file(tmp_path), tmp_path / "book")
    assert result.exit_code == 2 and "book/codebook.safetensors could not be written" in result.stderr
    assert "No space left on device" in result.stderr


def test_a_busy_port_names_the_option(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("demo", "--model", tmp_path, "--port", port)
    assert result.exit_code == 2 and f"--port {port} of 127.0.0.1 cannot be had" in result.stderr, result.output


def test_tables_fit_a_terminal_of_80_columns():
    """Nothing is cut, and no number or word is broken over two lines, an image's name aside."""
    from transformers_rbl.cli.evaluate import narrow_table
    from transformers_rbl.cli.inspect import PROVENANCE_COLUMNS, provenance_table

    columns = "rule|retention|visual tokens|normalised|normalised, of unpruned|prefill ms|KV cache MiB".split("|")
    cells = ["double_softmax, keep_ratio 0.15, tiles base", "100.0%", "2928.0", "93.8% [85.0%, 100.0%]"]
    cells += ["100.0% [100.0%, 100.0%]", "1234.5", "1092.80"]
    values = ["1234", "000000123456.jpg", "575", "0.0123", "0.00123", "63", "1184", "photograph"]
    tables = [
        narrow_table("org/model on data", columns, [cells]),
        provenance_table([dict(zip(PROVENANCE_COLUMNS, values))], 1),
    ]
    for table, words in zip(tables, (columns + cells, values[:1] + values[2:])):
        console = Console(width=80, file=io.StringIO())
        console.print(table)
        printed = console.file.getvalue()
        assert max(map(len, printed.splitlines())) <= 80
        assert not [word for text in words for word in text.split() if word not in printed], printed
