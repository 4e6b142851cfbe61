"""Importing the library waits for nothing, and the Auto classes still know its models, whatever is imported first."""

import subprocess
import sys

import pytest


HEAVY = ("torch", "transformers", "datasets", "sklearn", "matplotlib", "gradio")
KNOWN = """
from transformers import AutoConfig
assert AutoConfig.for_model("llava_next_rbl").model_type == "llava_next_rbl"
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers_rbl.models.families import FAMILIES
assert {f"{name}_rbl" for name in FAMILIES} <= set(CONFIG_MAPPING)
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("transformers_rbl")]
"""


def run(program):
    """In a process of its own, where nothing is imported yet."""
    done = subprocess.run([sys.executable, "-c", f"import sys\n{program}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--help"], "calibrate"), (["build", "--help"], "--from-records"), (["--version"], "transformers_rbl ")],
)
def test_the_command_line_answers_without_torch(arguments, word):
    output = run(f"""
from transformers_rbl.cli import app
try:
    app({arguments!r})
except SystemExit as stopped:
    assert not stopped.code
heavy = {set(HEAVY)} & set(sys.modules)
assert not heavy, heavy
""")
    assert word in output


@pytest.mark.parametrize("command", ["demo --model", "verify", "inspect"])
def test_a_path_without_a_model_is_refused_without_torch(command):
    run(f"""
from transformers_rbl.cli import app
try:
    app({[*command.split(), "./missing"]!r})
except SystemExit as stopped:
    assert stopped.code == 2
heavy = {set(HEAVY)} & set(sys.modules)
assert not heavy, heavy
""")


def test_importing_the_library_imports_neither_torch_nor_transformers():
    run(f"import transformers_rbl\nheavy = {set(HEAVY)} & set(sys.modules)\nassert not heavy, heavy")


@pytest.mark.parametrize(
    "first",
    [
        "transformers.cache_utils",
        "transformers.generation.utils",
        "transformers.modeling_layers",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llava_next.configuration_llava_next",
        "transformers.pipelines",
    ],
)
def test_transformers_knows_the_models_whatever_it_imports_first(first):
    run(f"import transformers_rbl, {first}\n{KNOWN}")


@pytest.mark.parametrize("first", ["auto_rbl", "modeling_any_rbl", "modeling_llava_rbl", "seam"])
def test_any_file_of_the_library_may_be_imported_first(first):
    run(f"import transformers_rbl.models.{first}\n{KNOWN}")


def test_transformers_may_be_imported_before_the_library():
    run(f"from transformers import AutoModel, pipeline\nimport transformers_rbl\n{KNOWN}")


def test_no_models_file_is_imported_before_its_class_is_asked_for():
    run(
        f"import transformers_rbl\n{KNOWN.partition('assert')[0]}\n"
        + """
loaded = [name for name in sys.modules if name.startswith("transformers.models.") and ".modeling_" in name]
assert not [name for name in loaded if ".auto." not in name], loaded
assert "transformers.generation.utils" not in sys.modules
"""
    )
