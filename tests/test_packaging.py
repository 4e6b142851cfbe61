"""What a user installs: versions that were tested together, and a small wheel that has every preset."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import transformers_rbl
from conftest import make_family


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}


def requirements_of(extra: str | None) -> list[Requirement]:
    """Those of the package or of one extra, with the extras that it names."""
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    requirements = []
    for requirement in map(Requirement, lines):
        if requirement.name == PROJECT["name"]:
            requirements += [inner for name in sorted(requirement.extras) for inner in requirements_of(name)]
        else:
            requirements.append(requirement)
    return requirements


@pytest.mark.parametrize("requirement", [*requirements_of(None), *requirements_of("test")], ids=str)
def test_every_requirement_has_a_version_that_was_tested(requirement):
    version = PINS[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)


def test_constraints_hold_on_any_machine():
    """Names and versions alone: no paths, URLs, local versions, or one platform's libraries of torch."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(PINS) > 50
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert not [name for name in PINS if name.startswith(("nvidia-", "cuda-", "triton", "transformers-rbl"))]


def test_pre_commit_formats_with_the_version_that_ci_checks_with():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = [hook["rev"] for hook in hooks if hook["repo"].endswith("/ruff-pre-commit")]
    assert revision == f"v{PINS['ruff']}"


def test_the_version_is_in_one_place_and_the_changelog_tells_of_it():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    assert heading == Version(transformers_rbl.__version__).base_version


def test_a_release_publishes_what_it_has_tried():
    jobs = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]
    steps = " ".join(step.get("run", "") for step in jobs["build"]["steps"])
    for command in ("python -m build", "twine check --strict", "rbl verify", "-lt 1048576", "refs/tags/v$version"):
        assert command in steps, command
    assert jobs["publish"]["needs"] == "build" and "refs/tags/v" in jobs["publish"]["if"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_is_small_and_has_every_recipe(wheel):
    assert wheel.stat().st_size < 2**20
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name.removeprefix("transformers_rbl/") for name in archive.namelist()}
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "codebooks").glob("*/recipe.yaml")}
    assert recipes and recipes <= shipped and "py.typed" in shipped
    assert {Path(name).name for name in shipped if name.startswith("codebooks/")} == {"README.md", "recipe.yaml"}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """`installed(*arguments)` runs `rbl` from the wheel, in a folder that is no checkout; or a Python program."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "packages")]
    subprocess.run([*command, str(wheel)], check=True, timeout=300)
    code = "import sys; sys.path.insert(0, 'packages'); from transformers_rbl.cli import app; app()"

    def run(*arguments, program=code):
        command = [sys.executable, "-P", "-c", program, *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)

    return run


@pytest.mark.slow
def test_an_installed_wheel_builds_by_a_preset(installed, tmp_path):
    family = make_family("llava_next", tmp_path / "stock")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(family.images(8)):
        image.save(photos / f"{number}.png")
    command = ["build", "--model", str(family.folder), "--images", str(photos), "--recipe", "digits"]
    done = installed(*command, "--set", "min_unique_images=1", "--out", str(tmp_path / "book"), "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    built, preset = (
        yaml.safe_load(path.read_text())
        for path in (tmp_path / "book" / "recipe.yaml", ROOT / "codebooks" / "digits" / "recipe.yaml")
    )
    assert built.items() >= (preset | {"min_unique_images": 1}).items()


@pytest.mark.slow
def test_an_installed_wheel_verifies_a_checkpoint_and_runs_a_script(installed):
    checkpoint = ROOT / "codebooks" / "digits-llava-next"
    done = installed("verify", str(checkpoint), "--dtype", "float32")
    assert done.returncode == 0 and "contract" in done.stdout, done.stdout + done.stderr
    script = f"""
import sys; sys.path.insert(0, "packages")
from transformers_rbl import __file__, rbl_class
model = rbl_class({str(checkpoint)!r}).from_pretrained({str(checkpoint)!r})
print(len(model.codebook.prototypes), "packages" in __file__)
"""
    done = installed(program=script)
    assert done.returncode == 0 and re.fullmatch(r"[1-9]\d* True", done.stdout.strip()), done.stderr


@pytest.mark.slow
def test_an_installed_wheel_says_that_the_demonstration_checkpoint_is_not_in_it(installed):
    done = installed("demo")
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"rbl: .*codebooks/digits-llava-next.*--model.*", done.stderr.strip().splitlines()[-1])
