"""`rbl fetch` against a server on this machine: what it downloads, keeps, checks, converts and says."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from transformers_rbl import RedundancyCodebook
from transformers_rbl.cli import app
from transformers_rbl.hub import released
from transformers_rbl.hub.publish import files_to_publish
from transformers_rbl.hub.released import COMMIT, MIRROR, RELEASED, Released, ReleasedFile, git_blob


DATA = Path(os.environ.get("UPSTREAM_CODEBOOKS", Path(__file__).parents[2] / "shared/data/upstream-codebooks"))
NAME = "llava-1.5-7b"


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        self.server.asked.append(self.path)


@pytest.fixture
def server(tmp_path):
    """A folder that is served, its address, and the paths that were asked for."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.asked, httpd.folder, httpd.url = [], folder, f"http://127.0.0.1:{httpd.server_address[1]}/repository"
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield httpd
        httpd.shutdown()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def codebook(server, monkeypatch):
    """A released codebook of the same layout, of which everything is known, on the server."""
    prototypes = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).half()
    contents = {"pt": None, "json": json.dumps([str(n) for n in range(6)]).encode()}
    torch.save(prototypes, server.folder / "book.pt")
    contents["pt"] = (server.folder / "book.pt").read_bytes()
    files = []
    for ending, content in contents.items():
        path = f"codebooks/one/book.{ending}"
        place = server.folder / "repository" / COMMIT / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        files.append(ReleasedFile(path, git_blob(content)))
    monkeypatch.setitem(released.RELEASED, NAME, Released("org/base", *files, (6, 8)))
    return prototypes


def fetch(*arguments):
    return CliRunner().invoke(app, ["fetch", *map(str, arguments)])


def test_a_codebook_is_fetched_converted_and_ready_to_publish(server, codebook, tmp_path):
    result = fetch(NAME, "--mirror", server.url)
    assert result.exit_code == 0, result.output
    assert server.asked == [f"/repository/{COMMIT}/codebooks/one/book.{ending}" for ending in ("pt", "json")]
    book = RedundancyCodebook.from_pretrained(tmp_path / NAME)
    assert torch.equal(book.prototypes, codebook.float()) and book.base_model == "org/base"
    source = book.built_with["source"]
    assert source["image_ids"] == [str(n) for n in range(6)] and source["commit"] == COMMIT
    assert "github.com/DingchenYang99" in source["repository"] and source["path"] == "codebooks/one/book.pt"
    card = (tmp_path / NAME / "README.md").read_text()
    assert "license: apache-2.0" in card and COMMIT in card and files_to_publish(tmp_path / NAME)
    assert result.output.strip().splitlines()[-1] == f"rbl demo --model org/base --codebook ./{NAME}"


def test_files_are_downloaded_once_and_offline_takes_them(server, codebook, tmp_path):
    assert fetch(NAME, "--mirror", server.url).exit_code == 0
    assert fetch(NAME, "--out", tmp_path / "again", "--offline").exit_code == 0 and len(server.asked) == 2
    assert fetch(NAME, "--mirror", server.url).exit_code == 0 and len(server.asked) == 2  # it is there
    cached = next((tmp_path / "home").rglob("book.pt"))
    cached.write_bytes(cached.read_bytes()[:-9])  # damaged, it is downloaded again
    assert fetch(NAME, "--mirror", server.url, "--out", tmp_path / "third").exit_code == 0 and len(server.asked) == 3


def test_offline_without_a_download_says_what_to_do_by_hand(codebook, tmp_path):
    result = fetch(NAME, "--offline")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    for words in ("was not downloaded before", f"{MIRROR}/{COMMIT}/codebooks/one/book.pt", "`rbl convert book.pt"):
        assert words in result.stderr
    assert not (tmp_path / NAME).exists()


def test_another_content_is_refused_and_not_kept(server, codebook, tmp_path):
    place = server.folder / "repository" / COMMIT / "codebooks/one/book.pt"
    place.write_bytes(place.read_bytes() + b"x")
    result = fetch(NAME, "--mirror", server.url)
    assert result.exit_code == 2 and "is not the file that was released (git blob" in result.stderr, result.output
    assert not (tmp_path / NAME).exists() and not list((tmp_path / "home").rglob("book.pt"))


def test_a_missing_file_and_a_missing_server(server, codebook, monkeypatch):
    shutil.rmtree(server.folder / "repository")
    assert "answers 404" in fetch(NAME, "--mirror", server.url).stderr
    for mirror, words in (("http://127.0.0.1:9", "cannot be reached"), ("nowhere", "is no address")):
        result = fetch(NAME, "--mirror", mirror)
        assert result.exit_code == 2 and words in result.stderr and "By hand: download" in result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("rbl: ")]
        assert len(lines) == 1 and "Traceback" not in result.output
    (server.folder / "repository" / COMMIT / "codebooks/one").mkdir(parents=True)
    (server.folder / "repository" / COMMIT / "codebooks/one/book.pt").write_bytes(b"0" * 100)
    monkeypatch.setattr(released, "MOST_BYTES", 10)
    assert "sends more than" in fetch(NAME, "--mirror", server.url).stderr


def test_a_folder_with_another_codebook_is_not_touched(server, codebook, tmp_path):
    RedundancyCodebook(torch.randn(2, 3)).save_pretrained(tmp_path / NAME)
    result = fetch(NAME, "--mirror", server.url)
    assert result.exit_code == 2 and "--overwrite" in result.stderr and not server.asked
    assert fetch(NAME, "--mirror", server.url, "--overwrite").exit_code == 0
    assert len(RedundancyCodebook.from_pretrained(tmp_path / NAME).prototypes) == 6


def test_the_list_and_unknown_names():
    result = fetch("--list")
    assert result.exit_code == 0 and all(name in result.output for name in RELEASED)
    for arguments in ((), ("llava-2",)):
        result = fetch(*arguments)
        assert result.exit_code == 2 and "There are llava-1.5-7b, " in result.stderr


def test_ids_are_gits_and_every_codebook_has_a_recipe(tmp_path):
    (tmp_path / "file").write_bytes(b"some\ncontent")
    command = ["git", "hash-object", "--no-filters", str(tmp_path / "file")]
    assert git_blob(b"some\ncontent") == subprocess.run(command, capture_output=True, text=True).stdout.strip()
    for name, codebook in RELEASED.items():
        assert (Path(__file__).parents[1] / "codebooks" / name / "recipe.yaml").is_file()
        assert all(len(file.blob) == 40 for file in (codebook.prototypes, codebook.image_ids))


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_files_themselves(server, name, tmp_path):
    codebook, files = RELEASED[name], (f"{name}.pt", f"{name}.image_ids.json")
    if not all((DATA / file).exists() for file in files):
        pytest.skip(f"upstream's codebooks are not in {DATA} (set UPSTREAM_CODEBOOKS)")
    for file, served in zip(files, (codebook.prototypes, codebook.image_ids)):
        place = server.folder / "repository" / COMMIT / served.path
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(DATA / file, place)
    result = fetch(name, "--mirror", server.url)
    assert result.exit_code == 0, result.output
    assert tuple(RedundancyCodebook.from_pretrained(tmp_path / name).prototypes.shape) == codebook.shape
