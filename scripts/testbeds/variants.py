"""What a builder could do better: codebooks that are selected otherwise from one set of probe records, made smaller, or
set against informative tokens; on validation scenes, by the paired difference to the recipe as it is.

rbl build --model codebooks/digits-llava-next --images outputs/images --recipe digits --out outputs/book
python scripts/testbeds compare-codebooks outputs/v2.json --case codebooks/digits-llava-next=outputs/book/records
"""

from __future__ import annotations

import datetime
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.building.build import read_records
from transformers_rbl.building.compressing import compress
from transformers_rbl.building.recipe import Recipe
from transformers_rbl.building.records import Records
from transformers_rbl.building.selection import EmptyCodebookError, Probe, divergence, prototypes, select_prototypes
from transformers_rbl.evaluation.metrics import bootstrap_interval
from transformers_rbl.models.scorers import max_cosine

from .comparison import accuracy
from .encoding import Encoded
from .leaderboard.answers import Asked, Scenes
from .leaderboard.cases import Case, committed_cases
from .leaderboard.ledger import Ledger
from .leaderboard.page import points, table
from .rules import Choose, library_rule, oracle, scored_rule


RETENTIONS = (0.15, 0.1, 0.05, 0.03)
BASE, ORACLE = "as it is", "oracle"
SELECTIONS: dict[str, dict[str, Any]] = {
    "quantiles 0.5": {"max_p1": 0.5, "max_divergence": 0.5},
    "quantiles 0.85": {"max_p1": 0.85, "max_divergence": 0.85},
    "divergence alone": {"max_p1": 1.0},
    "in clusters from more than 3 images": {"min_unique_images": 3},
    "in clusters from more than 12 images": {"min_unique_images": 12},
    "4 tokens of a cluster": {"tokens_per_cluster": 4},
    "every token of a cluster": {"tokens_per_cluster": None},
}
SHARES = {"half of the prototypes": 2, "a quarter of the prototypes": 4}  # what compression leaves
WEIGHTS = (0.25, 0.5, 1.0)  # of a negative codebook


def choices_of(
    probes: list[Probe], recipe: Recipe, others: dict[str, list[Probe]], only: Sequence[str] | None
) -> dict[str, tuple[Callable[[float], Choose], dict[str, Any]]]:
    """By name a codebook's rule, given a retention, and what is to be said of it: `prototypes`, `bound` or `error`;
    `others` are tokens that were probed otherwise, by name. With `only`, those of these names beside the recipe."""
    found: dict[str, tuple[Callable[[float], Choose], dict[str, Any]]] = {}
    base = RedundancyCodebook(prototypes(probes, select_prototypes(probes, recipe)))
    builds = {name: (probes, changed) for name, changed in {BASE: {}, **SELECTIONS}.items()}
    builds |= {name: (probed, {}) for name, probed in others.items()}
    for name, (probed, changed) in builds.items():
        if only and name not in (BASE, *only):
            continue
        try:
            tokens = prototypes(probed, select_prototypes(probed, replace(recipe, **changed)))
        except EmptyCodebookError as error:
            found[name] = (_nothing, {"prototypes": 0, "error": str(error)})
            continue
        found[name] = (functools.partial(_by_codebook, RedundancyCodebook(tokens)), {"prototypes": len(tokens)})
    for name, part in SHARES.items():
        smaller = compress(base, count=max(1, len(base.prototypes) // part))
        about = {"prototypes": len(smaller.rows), "bound": round(smaller.bound, 3)}
        found[name] = (functools.partial(_by_codebook, smaller.codebook), about)
    informative = RedundancyCodebook(informative_tokens(probes, recipe, len(base.prototypes)))
    for weight in WEIGHTS:
        rule = functools.partial(_against, base, informative, weight)
        found[f"minus {weight} times likeness to informative tokens"] = (rule, {"prototypes": len(base.prototypes)})
    found[ORACLE] = (functools.partial(scored_rule, oracle), {})
    return {name: each for name, each in found.items() if not only or name in (BASE, ORACLE, *only)}


def informative_tokens(probes: list[Probe], recipe: Recipe, count: int) -> torch.Tensor:
    """`(count, d)`: the probed tokens whose absence changes the answer most, of those that by themselves say something
    clearly (p1 above the median)."""
    tokens, p1 = torch.cat([probe.tokens for probe in probes]), torch.cat([probe.p1 for probe in probes])
    change = torch.cat([divergence(probe, recipe) for probe in probes]).masked_fill(p1 < p1.median(), 0)
    return tokens[change.argsort(descending=True, stable=True)[:count]]


def _by_codebook(book: RedundancyCodebook, ratio: float) -> Choose:
    return library_rule(PruningConfig(keep_ratio=ratio), book)


def _against(book: RedundancyCodebook, informative: RedundancyCodebook, weight: float, ratio: float) -> Choose:
    """Keeps tokens of lowest max cos(x, p) - weight * max cos(x, n), over prototypes p and informative tokens n."""

    def score(encoded: Encoded) -> torch.Tensor:
        low, high = (max_cosine(encoded.tokens.float(), each.unit_prototypes) for each in (book, informative))
        return low - weight * high

    return scored_rule(score, ratio)


def _nothing(ratio: float) -> Choose:
    raise ValueError("A codebook without prototypes chooses nothing.")


@torch.no_grad()
def compare(
    case: Case, folders: Sequence[Path], scenes: Scenes, ledger: Ledger, recipe: Recipe, only: Sequence[str] | None
) -> dict[str, Any]:
    """Of a case, `rows` by variant: `about` and, at each retention, right answers by scene. The first of the folders
    holds the records of the recipe as it is, the others are named by what was different when they were probed."""
    asked, rows = Asked(case, scenes), {}
    first, *rest = (Records(folder) for folder in folders)
    others = {_difference(first, records): read_records(records)[0] for records in rest}
    for name, (rule, about) in choices_of(read_records(first)[0], recipe, others, only).items():
        rows[name] = {**about, "right": {}}
        for ratio in RETENTIONS if about.get("prototypes", 1) else ():

            def answers(rule: Callable[[float], Choose] = rule, ratio: float = ratio) -> str:
                right, _ = accuracy(asked.model, asked.tokenizer, asked.encoded, rule(ratio))
                return "".join(str(int(row.sum())) for row in right)

            rows[name]["right"][str(ratio)] = ledger.get((case.name, asked.digest, "variant", name, ratio), answers)
    questions = ledger.get((case.name, asked.digest, "questions"), lambda: len(asked.examples[0].questions))
    return {"name": case.name, "questions": questions, "rows": rows}


def _difference(first: Records, other: Records) -> str:
    settings = other.run["recipe"]
    changed = [f"{name} {value}" for name, value in settings.items() if value != first.run["recipe"][name]]
    return f"probed with {', '.join(changed) or 'the same recipe'}"


def shares(case: dict[str, Any], name: str) -> np.ndarray:
    """`(retentions, scenes)`: share of a scene's questions that were answered rightly."""
    right = case["rows"][name]["right"]
    return np.array([[int(digit) for digit in right[str(ratio)]] for ratio in RETENTIONS]) / case["questions"]


def verdicts(cases: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """By variant, where it is better than the recipe as it is, over all retentions, beyond its paired interval."""
    won: dict[str, list[str]] = {}
    for case in cases:
        for name, row in case["rows"].items():
            if name not in (BASE, ORACLE) and row["right"]:
                low, _ = bootstrap_interval((shares(case, name) - shares(case, BASE)).mean(0))
                won.setdefault(name, [])
                won[name] += [case["name"]] if low > 0 else []
    return won


def page(contents: Sequence[dict[str, Any]]) -> str:
    """Markdown of a comparison on validation scenes, and of one on test scenes of what won there, if it was made."""
    parts = [
        "# Recipe, second look: what a builder could do better",
        "Codebooks of one set of probe records a checkpoint, selected otherwise, compressed, or set against "
        "informative tokens. Differences to the recipe as it is, in points of accuracy, paired over scenes, with 95% "
        "intervals; score `cosine`. A variant becomes the default of new codebooks if it is better beyond its "
        "interval, over all retentions, on two checkpoints, and again on test scenes.",
        "What a left-out token becomes (the pad token, nothing, or the image's mean, as in the recipe) takes probing "
        "anew; of LLaVA-NeXT the [testbeds' page](testbed.md#what-each-step-of-a-build-is-worth) has it.",
    ]
    won = [[name for name, where in verdicts(each["cases"]).items() if len(where) >= 2] for each in contents]
    if len(contents) == 2:
        both = [name for name in won[0] if name in won[1]]
        parts.append(f"**{', '.join(both)}: again on test scenes.**" if both else "**No change held on test scenes.**")
    for content, winners in zip(contents, won):
        about = content["about"]
        verdict = f"Better on two checkpoints or more, beyond the interval: **{', '.join(winners)}**."
        if not winners:
            verdict = "**Nothing is better than the recipe as it is, beyond its interval, on two checkpoints.**"
        parts += [
            f"## On {about['split']} scenes",
            f"{about['scenes']} scenes of each checkpoint, seed {about['seed']}, recipe `{about['recipe']}`; "
            f"{about['machine']}, {about['date']}. Written by this command:",
            f"```bash\n{about['command']}\n```",
            verdict,
            *tables(content),
        ]
    return "\n\n".join(parts) + "\n"


def tables(content: dict[str, Any]) -> list[str]:
    """A table a checkpoint."""
    parts: list[str] = []
    for case in content["cases"]:
        rows = []
        base = shares(case, BASE)
        for name, row in case["rows"].items():
            size = str(row.get("prototypes") or "") + (f" (bound {row['bound']})" if "bound" in row else "")
            if not row["right"]:
                rows.append([name, row["error"], *[""] * (len(RETENTIONS) + 1)])
                continue
            gaps = [*(shares(case, name) - base), (shares(case, name) - base).mean(0)]
            cells = [points((100 * gap.mean(), *(100 * end for end in bootstrap_interval(gap)))) for gap in gaps]
            if name == BASE:
                cells = [f"{100 * part.mean():.1f}%" for part in [*base, base.mean(0)]]
            rows.append([name, size, *cells])
        columns = ["codebook", "prototypes", *(f"{ratio:.0%}" for ratio in RETENTIONS), "all"]
        parts += [f"### {case['name']}", table(columns, rows)]
    return parts


def main(
    out: Annotated[Path, typer.Argument(help="JSON to write, NAME.json or NAME-test.json; both go into NAME.md.")],
    case: Annotated[
        list[str], typer.Option(help="CHECKPOINT=RECORDS, of `rbl build`; a checkpoint's second ones are a variant.")
    ],
    recipe: Annotated[str, typer.Option(help="What is changed: a preset or a file.")] = "digits",
    count: Annotated[int, typer.Option(min=2, help="Scenes of each, of four questions.")] = 100,
    split: Annotated[str, typer.Option(help="validation, or test to confirm what won.")] = "validation",
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = 100,
    only: Annotated[list[str] | None, typer.Option(help="Variants, by name; default all. Repeat.")] = None,
    work: Annotated[Path, typer.Option(help="What is known so far.")] = Path("outputs/variants.jsonl"),
) -> None:
    """Codebooks that were selected otherwise, compressed or set against informative tokens."""
    torch.set_num_threads(1)
    given: dict[Path, list[Path]] = {}
    for name, records in (entry.split("=", 1) for entry in case):
        given.setdefault(Path(name).resolve(), []).append(Path(records))
    ledger, scenes, base = Ledger(work), Scenes(count, split, seed), Recipe.load(recipe)
    found = {
        each.checkpoint.resolve(): each for each in reversed(list(committed_cases()))
    }  # of several kinds, the first
    if unknown := sorted(str(path) for path in given.keys() - found.keys()):
        raise typer.BadParameter(f"No committed checkpoint: {', '.join(unknown)}.")
    cases = [compare(found[path], folders, scenes, ledger, base, only) for path, folders in given.items()]
    asked = {"--recipe": (recipe, "digits"), "--count": (count, 100), "--split": (split, "validation")}
    asked |= {"--seed": (seed, 100)}
    options = "".join(f" --case {each}" for each in case) + "".join(f" --only {name!r}" for name in only or ())
    options += "".join(f" {name} {value}" for name, (value, default) in asked.items() if value != default)
    about = {
        "command": f"python scripts/testbeds compare-codebooks {out}{options}",
        "machine": f"{os.cpu_count()} cores, CPU, one thread",
        "date": str(datetime.date.today()),
        "recipe": recipe,
        "scenes": count,
        "split": split,
        "seed": seed,
    }
    content = {"about": about, "cases": cases}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content) + "\n")
    stem = out.stem.removesuffix("-test")
    known = [path for path in (out.with_stem(stem), out.with_stem(f"{stem}-test")) if path.is_file()]
    written = out.with_name(f"{stem}.md")
    written.write_text(page([json.loads(path.read_text()) for path in known]))
    print(written)
