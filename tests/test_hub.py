"""Push, pull and share over the real client and real HTTP, to a Hub on this machine; every pull in a new process with
an empty cache."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import HfApi
from safetensors.torch import load, save
from typer.testing import CliRunner

from conftest import GREEDY, ONE, make_family
from hub_server import OWNER_TOKEN, READER_TOKEN, HubServer
from transformers_rbl import RedundancyCodebook
from transformers_rbl.cli import app
from transformers_rbl.hub.publish import files_to_publish


MODEL, BOOK, STOCK = "org/llava-next-rbl", "org/rbl-codebook", "org/stock"
SMALL = "200KB"  # shards
CODEBOOKS = Path(__file__).parent.parent / "codebooks"


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        # The client reads these when it is imported: here, where it is already, its constants are set too.
        for name, value in environment(server, OWNER_TOKEN).items():
            patch.setenv(name, value)
        import huggingface_hub.constants as constants

        patch.setattr(constants, "ENDPOINT", server.url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr("huggingface_hub.hf_api.api.endpoint", server.url)
        yield server


def environment(server, token=None):
    values = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return values | ({"HF_TOKEN": token} if token else {})


@pytest.fixture(scope="module")
def next_family(tmp_path_factory):
    return make_family("llava_next", tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def pushed(hub, next_family):
    """A model with everything, a codebook, and the stock checkpoint, on the Hub."""
    book = RedundancyCodebook(
        next_family.codebook.prototypes, base_model=STOCK, recommended_keep_ratio=0.3, built_with={"images": {"n": 2}}
    )
    api = HfApi(endpoint=hub.url, token=OWNER_TOKEN)
    api.create_repo(STOCK)
    api.upload_folder(repo_id=STOCK, folder_path=next_family.folder)
    model = next_family.pruned(codebook=book, keep_ratio=0.3)
    model.config.base_model = STOCK
    model.push_to_hub(
        MODEL,
        processor=next_family.processor,
        with_code=True,
        license="apache-2.0",
        token=OWNER_TOKEN,
        max_shard_size=SMALL,
        tags=["mine"],
    )
    book.push_to_hub(BOOK, token=OWNER_TOKEN, license="apache-2.0")
    api.create_tag(MODEL, tag="v1")
    return model


PRELUDE = """
import json, sys, torch
def show(**values):
    print("RESULT " + json.dumps(values))
def ids_of(model, inputs):
    inputs = torch.load(inputs, weights_only=True)
    return model.generate(**inputs, do_sample=False, max_new_tokens=8).tolist()
"""


def fresh(hub, tmp_path, code, token=None, python=None, cache="cache", offline=False):
    """What `code` shows, in a new process with a cache of its own."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | environment(hub, token)
    variables |= {
        "HF_HOME": str(tmp_path / cache),
        "HF_HUB_OFFLINE": str(int(offline)),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        [python or sys.executable, "-c", PRELUDE + code], env=variables, capture_output=True, text=True, timeout=300
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise AssertionError(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def question(next_family, pushed, tmp_path_factory):
    """Inputs as a file, and the ids that the pushed model answers."""
    inputs = next_family.inputs(ONE)
    path = tmp_path_factory.mktemp("question") / "inputs.pt"
    torch.save(dict(inputs), path)
    return path, pushed.generate(**inputs, **GREEDY).tolist()


def test_the_repository_has_everything_in_shards(hub, pushed):
    files = set(HfApi(endpoint=hub.url, token=OWNER_TOKEN).list_repo_files(MODEL))
    assert {
        "README.md",
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    } <= files
    assert {"modeling_llava_next_rbl.py", "pruning.py", "prompt.py", "codebook.py"} <= files
    assert sum(name.endswith(".safetensors") for name in files) > 1
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)


def test_every_auto_class_gives_the_same_from_a_new_process(hub, question, tmp_path):
    """AutoModelForImageTextToText, AutoModel, the pipeline; weights and codebook bit for bit; then offline."""
    path, ids = question
    code = f"""
import transformers_rbl
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
model = AutoModelForImageTextToText.from_pretrained("{MODEL}")
headless = AutoModel.from_pretrained("{MODEL}")
same = all(torch.equal(v, model.model.state_dict()[k]) for k, v in headless.state_dict().items())
from PIL import Image
pipe = pipeline("image-text-to-text", model="{MODEL}")
said = pipe(Image.new("RGB", (40, 30), "red"), text="<s>USER: <image>\\nWhat? ASSISTANT:", max_new_tokens=3)
torch.save({{k: v for k, v in model.state_dict().items()}}, r"{tmp_path / "weights.pt"}")
show(ids=ids_of(model, r"{path}"), same=same, headless=type(headless).__name__, said=said[0]["generated_text"],
     pruning=model.pruning.to_dict(), known=model.codebook.metadata())
"""
    found = fresh(hub, tmp_path, code)
    assert found["ids"] == ids and found["same"] and found["headless"] == "LlavaNextModelRBL" and found["said"]
    assert found["pruning"]["keep_ratio"] == 0.3 and found["known"]["built_with"] == {"images": {"n": 2}}
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    saved = {}
    for name in hub.repositories[MODEL].files[hub.repositories[MODEL].resolve("main")]:
        if name.endswith(".safetensors"):
            saved |= load(hub.content(MODEL, name))
    assert saved and weights["model.codebook.prototypes"].dtype == torch.float32
    assert {v.shape for k, v in saved.items() if "codebook" in k} == {weights["model.codebook.prototypes"].shape}
    assert all(torch.equal(saved[k], weights[k]) for k in saved if k in weights)

    before = len(hub.requests)
    again = f"""
import transformers_rbl
from transformers import AutoModelForImageTextToText
show(ids=ids_of(AutoModelForImageTextToText.from_pretrained("{MODEL}", local_files_only=True), r"{path}"))
"""
    assert fresh(hub, tmp_path, again, offline=True)["ids"] == ids and len(hub.requests) == before


def test_remote_code_on_a_machine_without_this_package(hub, question, tmp_path):
    """The package is made impossible to import, in the folder of the interpreter too."""
    path, ids = question
    code = f"""
import importlib.abc
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "transformers_rbl" or name.startswith("transformers_rbl."):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("{MODEL}", trust_remote_code=True)
headless = AutoModel.from_pretrained("{MODEL}", trust_remote_code=True)
AutoProcessor.from_pretrained("{MODEL}", trust_remote_code=True)
model.save_pretrained(r"{tmp_path / "again"}")
show(ids=ids_of(model, r"{path}"), module=type(model).__module__, headless=type(headless).__name__)
"""
    found = fresh(hub, tmp_path, code)
    assert found["ids"] == ids and found["module"].startswith("transformers_modules.")
    assert found["headless"] == "LlavaNextModelRBL"
    assert (tmp_path / "again" / "pruning.py").exists()  # saved again, it is still complete


def test_a_stock_model_and_a_codebook_both_from_the_hub(hub, pushed, question, tmp_path):
    path, ids = question
    code = f"""
from transformers_rbl import LlavaNextForConditionalGenerationRBL as RBL, RedundancyCodebook
model = RBL.from_pretrained("{STOCK}", codebook="{BOOK}", codebook_revision="main")
book = RedundancyCodebook.from_pretrained("{BOOK}", revision="main")
torch.save(book.prototypes, r"{tmp_path / "book.pt"}")
show(ids=ids_of(model, r"{path}"), ratio=model.pruning.keep_ratio, known=book.metadata())
"""
    found = fresh(hub, tmp_path, code)
    assert found["ids"] == ids and found["ratio"] == 0.3 and found["known"]["base_model"] == STOCK
    assert torch.equal(torch.load(tmp_path / "book.pt", weights_only=True), pushed.codebook.prototypes)


def test_a_codebook_of_another_base_model_is_refused_with_both_names(hub, pushed, next_family, tmp_path):
    other = RedundancyCodebook(next_family.codebook.prototypes, base_model="org/other", recommended_keep_ratio=0.5)
    other.push_to_hub("org/other-codebook", token=OWNER_TOKEN)
    pull = next_family.rbl_class.from_pretrained
    with pytest.raises(ValueError, match=rf"made for org/other, but the model is {STOCK}"):
        pull(STOCK, codebook="org/other-codebook", cache_dir=tmp_path)
    forced = pull(STOCK, codebook="org/other-codebook", cache_dir=tmp_path, check_base=False)
    assert forced.codebook.base_model == "org/other"


def test_private_repositories_tokens_revisions_and_tags(hub, next_family, tmp_path):
    book = next_family.codebook
    book.push_to_hub("org/secret", private=True, token=OWNER_TOKEN)
    for token in (READER_TOKEN, False):
        with pytest.raises(OSError, match="404|401"):
            RedundancyCodebook.from_pretrained("org/secret", token=token, cache_dir=tmp_path)
    with pytest.raises(OSError, match="403|401"):
        book.push_to_hub("org/secret", token=READER_TOKEN)
    api = HfApi(endpoint=hub.url, token=OWNER_TOKEN)
    api.create_tag("org/secret", tag="first")
    first = hub.repositories["org/secret"].resolve("main")
    RedundancyCodebook(book.prototypes + 1).push_to_hub("org/secret", token=OWNER_TOKEN, commit_message="another")

    def pull(**kwargs):
        return RedundancyCodebook.from_pretrained(
            "org/secret", token=OWNER_TOKEN, cache_dir=tmp_path, **kwargs
        ).prototypes

    assert torch.equal(pull(revision="first"), book.prototypes) and torch.equal(pull(revision=first), book.prototypes)
    assert torch.equal(pull(), book.prototypes + 1)
    assert torch.equal(pull(local_files_only=True), book.prototypes + 1)
    with pytest.raises(OSError, match="nowhere"):
        pull(revision="nowhere")
    with pytest.raises(OSError):
        RedundancyCodebook.from_pretrained("org/never", token=OWNER_TOKEN, cache_dir=tmp_path)


def test_a_model_at_a_revision_of_a_private_repository(hub, next_family, pushed, tmp_path):
    pushed.push_to_hub("org/private-rbl", private=True, token=OWNER_TOKEN, revision="trial")
    pull = next_family.rbl_class.from_pretrained
    model = pull("org/private-rbl", revision="trial", token=OWNER_TOKEN, cache_dir=tmp_path)
    assert torch.equal(model.codebook.prototypes, pushed.codebook.prototypes)
    with pytest.raises(OSError):
        pull("org/private-rbl", revision="main", token=OWNER_TOKEN, cache_dir=tmp_path)  # nothing there
    with pytest.raises(OSError):
        pull("org/private-rbl", revision="trial", token=READER_TOKEN, cache_dir=tmp_path)


@pytest.mark.parametrize("repo", [MODEL, BOOK])
def test_cards_are_valid_and_their_snippet_runs(hub, pushed, repo, tmp_path):
    card = hub.content(repo, "README.md").decode()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == STOCK and header["license"] == "apache-2.0"
    assert header["library_name"] == ("transformers" if repo == MODEL else "transformers_rbl")
    assert repo != MODEL or (header["pipeline_tag"] == "image-text-to-text" and "mine" in header["tags"])
    assert "keep_ratio" in card and "0.3" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    found = fresh(
        hub, tmp_path, snippet + "\nshow(ratio=model.pruning.keep_ratio, count=len(model.codebook.prototypes))"
    )
    assert found == {"ratio": 0.3, "count": len(pushed.codebook.prototypes)}


def test_a_repository_without_a_codebook_says_so(hub, pushed, tmp_path):
    with pytest.raises(OSError, match=r"has no codebook.json: .*load the model") as error:
        RedundancyCodebook.from_pretrained(MODEL, cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_a_body_that_is_cut_short_is_noticed(hub, pushed, tmp_path):
    with hub.failing("codebook.safetensors", "cut", times=100), pytest.raises(OSError, match="(?i)consistency"):
        RedundancyCodebook.from_pretrained(BOOK, cache_dir=tmp_path)
    again = RedundancyCodebook.from_pretrained(BOOK, cache_dir=tmp_path)
    assert torch.equal(again.prototypes, pushed.codebook.prototypes)


def test_a_card_that_somebody_wrote_stays(hub, next_family):
    next_family.codebook.push_to_hub("org/carded", token=OWNER_TOKEN)
    hub.put("org/carded", "README.md", b"---\ntags: [x]\n---\nmine")
    next_family.codebook.push_to_hub("org/carded", token=OWNER_TOKEN)
    assert hub.content("org/carded", "README.md") == b"---\ntags: [x]\n---\nmine"


def test_an_interrupted_download_leaves_nothing_half_loaded_and_goes_on(hub, pushed, tmp_path):
    name = "codebook.safetensors"

    def pull():
        return RedundancyCodebook.from_pretrained(BOOK, cache_dir=tmp_path)

    with hub.failing(name, "drop", times=100), pytest.raises(Exception, match=r"(?i)incomplete|disconnect|closed|peer"):
        pull()
    assert torch.equal(pull().prototypes, pushed.codebook.prototypes)


@pytest.mark.parametrize("status", [500, 503])
def test_a_failing_server_is_an_error_that_says_so(hub, pushed, status, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    with hub.failing("codebook.json", "status", times=100, status=status, method="HEAD"), pytest.raises(OSError):
        RedundancyCodebook.from_pretrained(BOOK, cache_dir=tmp_path)


DAMAGED = {
    "truncated weights": ("codebook.safetensors", lambda b: b[: len(b) // 2], r"codebook\.safetensors is truncated"),
    "no JSON": ("codebook.json", lambda b: b"{", r"codebook\.json is no codebook description"),
    "fields missing": ("codebook.json", lambda b: b"{}", r"codebook\.json is no codebook description"),
    "a newer version": (
        "codebook.json",
        lambda b: b.replace(b'"version": 1', b'"version": 9'),
        "format version 9.*upgrade",
    ),
    "unknown settings": (
        "codebook.json",
        lambda b: b.replace(b'"base_model"', b'"new": 1, "base_model"'),
        "new: written by a newer",
    ),
    "another width": (
        "codebook.json",
        lambda b: b.replace(b'"width": 32', b'"width": 31'),
        "announces prototypes of shape",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_codebooks_are_named_in_a_sentence(hub, next_family, case, tmp_path):
    file, damage, words = DAMAGED[case]
    repo = f"org/damaged-{len(case)}-{case.split()[-1]}"
    next_family.codebook.push_to_hub(repo, token=OWNER_TOKEN)
    hub.put(repo, file, damage(hub.content(repo, file)))
    with pytest.raises(ValueError, match=words) as error:
        RedundancyCodebook.from_pretrained(repo, cache_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_a_pulled_model_without_its_codebook_or_with_unknown_settings_raises(hub, next_family, pushed, tmp_path):
    pushed.push_to_hub("org/broken-rbl", token=OWNER_TOKEN)
    weights = load(hub.content("org/broken-rbl", "model.safetensors"))
    kept = {name: value for name, value in weights.items() if "codebook" not in name}
    config = hub.content("org/broken-rbl", "config.json")
    hub.put("org/broken-rbl", "model.safetensors", save(kept, {"format": "pt"}))
    pull = next_family.rbl_class.from_pretrained
    with pytest.raises(ValueError, match=r"codebook\.prototypes"):
        pull("org/broken-rbl", cache_dir=tmp_path / "one")
    hub.put("org/broken-rbl", "model.safetensors", save(weights, {"format": "pt"}))
    hub.put("org/broken-rbl", "config.json", config.replace(b'"keep_ratio"', b'"future_rule"'))
    with pytest.raises(ValueError, match="config.json of org/broken-rbl: .*future_rule.*upgrade it"):
        pull("org/broken-rbl", cache_dir=tmp_path / "two")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_no_downloaded_pickle_is_opened(hub, next_family, pushed, tmp_path):
    """Under every name that could be tried: beside the real files, and in their place."""
    mark = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists()  # it works
    mark.unlink()
    names = [
        "codebook.pt",
        "codebook.bin",
        "codebook.pkl",
        "prototypes.pt",
        "pytorch_model.bin",
        "codebook.safetensors",
    ]
    next_family.codebook.push_to_hub("org/bomb", token=OWNER_TOKEN)
    for name in names:
        hub.put("org/bomb", name, bomb)
    with pytest.raises((ValueError, OSError)):
        RedundancyCodebook.from_pretrained("org/bomb", cache_dir=tmp_path)
    pushed.push_to_hub("org/bomb-model", token=OWNER_TOKEN)
    for name in [*names, "model.pt", "model.bin", "adapter_model.bin"]:
        hub.put("org/bomb-model", name, bomb)
    next_family.rbl_class.from_pretrained("org/bomb-model", cache_dir=tmp_path)
    hub.put("org/bomb-model", "model.safetensors", bomb)
    with pytest.raises(OSError, match=r"org/bomb-model is truncated or no safetensors.*force_download"):
        next_family.rbl_class.from_pretrained("org/bomb-model", cache_dir=tmp_path / "again")
    assert not mark.exists()


def test_the_command_line_says_a_404_and_a_401_in_words(hub, next_family, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", READER_TOKEN)
    result = CliRunner().invoke(app, ["inspect", "org/missing"])
    assert result.exit_code == 2 and "org/missing is neither a folder here nor a repository" in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("rbl: ")]) == 1
    next_family.codebook.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    result = CliRunner().invoke(app, ["publish", str(tmp_path), "org/refused"])
    assert result.exit_code == 2 and "The Hub refuses this for org/refused (40" in result.stderr, result.output
    assert "hf auth login" in result.stderr and "org/refused" not in hub.repositories


def test_publishing_a_folder(hub, next_family, tmp_path, monkeypatch):
    folder = tmp_path / "book"
    next_family.codebook.save_pretrained(folder)
    for name in ("records/0.safetensors", ".hidden", "provenance.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)

    def run(*arguments):
        return CliRunner().invoke(app, ["publish", str(folder), "org/published", *arguments])

    result = run()
    assert result.exit_code == 2 and "README.md" in result.stderr and "org/published" not in hub.repositories
    (folder / "README.md").write_text("---\ntags: [x]\n---\nA card")
    result = run("--dry-run")
    assert result.exit_code == 0 and "codebook.safetensors" in result.output and "records" not in result.output
    assert "org/published" not in hub.repositories
    (folder / "old.pt").write_bytes(b"x")
    assert "pickles are not published" in run().stderr and "org/published" not in hub.repositories
    (folder / "old.pt").unlink()
    result = run("--private")
    assert result.exit_code == 0, result.stderr
    repository = hub.repositories["org/published"]
    assert repository.private
    assert set(repository.files[repository.resolve("main")]) == {
        ".gitattributes",
        "README.md",
        "codebook.json",
        "codebook.safetensors",
        "provenance.csv",
    }
    weights = folder / "codebook.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "truncated" in run("--dry-run").stderr


@pytest.mark.parametrize("folder", sorted(path.name for path in CODEBOOKS.iterdir() if path.is_dir()))
def test_every_folder_of_codebooks_is_publishable(folder):
    assert files_to_publish(CODEBOOKS / folder)
