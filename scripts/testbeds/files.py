"""A testbed's images and questions as files, for `rbl build`, `rbl calibrate`, `rbl evaluate` and lmms-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .registry import TESTBEDS, Family, Split, TestbedName, check_family


def write_images(
    folder: Annotated[Path, typer.Argument()],
    family: Family = "llava_next",
    count: Annotated[int, typer.Option(min=1)] = 64,
    split: Split = "train",
    seed: Annotated[int, typer.Option(min=0)] = 1,
    testbed_name: TestbedName = "digits",
) -> None:
    """Unlabelled images, to build a codebook or to calibrate with. Of LLaVA-NeXT every second one is of a single tile's
    size, since a codebook is built from base images: these show tokens at the scale of tiles."""
    testbed = TESTBEDS[testbed_name]
    check_family(testbed, family)
    kind, lines = testbed.kinds[family][0], []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        grid = (1, 1) if family == "llava_next" and number % 2 else None
        example = next(testbed.examples(family, kind, split, 1, seed * 100_003 + number, grid))
        name = f"{number:05}.png"
        example.pictures()[number % len(example.images)].save(folder / name)
        if len(example.images) == 1:
            lines += [
                {"image": name, "question": question, "answer": reply} for _, question, reply in example.questions
            ]
    if lines:  # which building does not read
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def write_questions(
    folder: Annotated[Path, typer.Argument()],
    family: Family = "llava_next",
    count: Annotated[int, typer.Option(min=1, help="Examples, of four questions each.")] = 50,
    split: Split = "test",
    seed: Annotated[int, typer.Option(min=0)] = 100,
    task: Annotated[str | None, typer.Option(help="Make the folder an lmms-eval task of this name, too.")] = None,
    testbed_name: TestbedName = "digits",
) -> None:
    """`questions.jsonl` with its images, as `rbl evaluate` reads them."""
    testbed = TESTBEDS[testbed_name]
    check_family(testbed, family)
    kind, lines = testbed.kinds[family][0], []
    folder.mkdir(parents=True, exist_ok=True)
    for number, example in enumerate(testbed.examples(family, kind, split, count, seed)):
        names = [f"{number:05}-{place}.png" for place in range(len(example.images))]
        for name, picture in zip(names, example.pictures()):
            picture.save(folder / name)
        for sort, question, reply in example.questions:
            row = {"image": names, "question": example.prompt(question), "answer": reply, "kind": sort}
            lines.append(json.dumps(row))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    if task is not None:
        (folder / f"{task}.yaml").write_text(TASK.format(task=task, questions=(folder / "questions.jsonl").resolve()))
        (folder / "utils.py").write_text(TASK_FUNCTIONS)


TASK = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{questions}"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.images
doc_to_text: question
doc_to_target: answer
process_results: !function utils.score
generation_kwargs: {{max_new_tokens: 16, do_sample: false}}
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 1.0}}]
"""
TASK_FUNCTIONS = """from pathlib import Path

from PIL import Image


def images(doc):
    return [Image.open(Path(__file__).with_name(name)).convert("RGB") for name in doc["image"]]


def score(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
"""
