"""The leaderboard in one command: answers, times, needs, and the page made of them.

python scripts/testbeds leaderboard
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

from transformers_rbl.models.scorers import SCORERS

from ..registry import Split
from .answers import RETENTIONS, Scenes, answer_all
from .cases import committed_cases
from .drawing import plot_lost, plot_standings
from .ledger import Ledger
from .losing import worst_scene
from .needs import needs_of_rules
from .page import FEW, page, uses_codebook
from .standing import Standing
from .times import selection_times


WORST_OF = 20  # scenes that the picture is chosen from


def main(
    out: Annotated[Path, typer.Option(help="Folder for leaderboard.md, .json and pictures.")] = Path("docs/results"),
    work: Annotated[Path, typer.Option(help="What is known so far; delete it after a change to a rule.")] = Path(
        "outputs/leaderboard.jsonl"
    ),
    count: Annotated[int, typer.Option(min=2, help="Scenes of each checkpoint, of four questions each.")] = 200,
    split: Split = "test",
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes.")] = 2026,
    rounds: Annotated[int, typer.Option("--times", min=0, help="Rounds of timing; 0: none.")] = 9,
    only: Annotated[list[str] | None, typer.Option(help="Rules to run, by name; default all. Repeat.")] = None,
    checkpoint: Annotated[list[str] | None, typer.Option(help="Folders of codebooks/; default all. Repeat.")] = None,
    retention: Annotated[list[float] | None, typer.Option(help="Shares to keep; default seven. Repeat.")] = None,
    merged_at: Annotated[list[float] | None, typer.Option(help="Where rules merge, too; default all. Repeat.")] = None,
) -> None:
    """Every rule on every committed testbed checkpoint. Started again, it goes on with what is missing."""
    torch.set_num_threads(1)
    if unknown := sorted(set(only or ()) - set(SCORERS)):
        raise typer.BadParameter(f"--only is one of {', '.join(SCORERS)}, not {', '.join(unknown)}.")
    scores, ratios = tuple(only or SCORERS), sorted(retention or RETENTIONS, reverse=True)
    cases = [case for case in committed_cases() if checkpoint is None or case.checkpoint.name in checkpoint]
    if not cases:
        raise typer.BadParameter("No such checkpoint is committed in codebooks/.")
    ledger, scenes = Ledger(work), Scenes(count, split, seed)
    answered = [answer_all(case, scenes, ledger, scores, ratios, merged_at) for case in cases]
    needs = needs_of_rules(scores, cases, ledger)
    times = selection_times(scores, rounds, ledger) if rounds else {}
    options = "".join(f" --only {name}" for name in only or ())
    options += "".join(f" --checkpoint {name}" for name in checkpoint or ())
    options += "".join(f" --retention {ratio}" for ratio in retention or ())
    options += "".join(f" --merged-at {ratio}" for ratio in merged_at or ())
    asked = {"--count": (count, 200), "--split": (split, "test"), "--seed": (seed, 2026), "--times": (rounds, 9)}
    options += "".join(f" {name} {value}" for name, (value, default) in asked.items() if value != default)
    about = {
        "command": f"python scripts/testbeds leaderboard{options}",
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), CPU, one thread",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": str(datetime.date.today()),
        "minutes": round(ledger.seconds / 60, 1),
        "split": split,
        "seed": seed,
    }
    standings = [Standing(each["about"], each["rows"]) for each in answered]
    few, lost = min(ratios, key=lambda ratio: abs(ratio - FEW[0])), []
    for case, standing in zip(cases, standings):
        with_book = [name for name in standing.at(few) if uses_codebook(name, needs)]
        if with_book:
            best = standing.best(few, with_book).split(",")[0]
            lost.append(worst_scene(case, best, few, Scenes(min(count, WORST_OF), split, seed)))
    lost = [scene for scene in lost if scene is not None]
    out.mkdir(parents=True, exist_ok=True)
    plot_standings(standings, needs, out / "leaderboard.png")
    if lost:
        plot_lost(lost, out / "leaderboard-kept.png")
    pictured = {"at": few, "of": WORST_OF, "checkpoints": [scene.checkpoint for scene in lost]}
    content = {"about": about, "cases": answered, "times": times, "needs": needs, "pictured": pictured}
    (out / "leaderboard.json").write_text(as_lines(content))
    (out / "leaderboard.md").write_text(page(content))
    print(f"{out / 'leaderboard.md'}, leaderboard.json and pictures; {about['minutes']} CPU-minutes.")


def as_lines(content: dict) -> str:
    """JSON with a line for each run, so that versions can be compared."""
    text = json.dumps({**content, "cases": []}, indent=1)
    cases = []
    for case in content["cases"]:
        rows = ",\n".join(json.dumps(row) for row in case["rows"])
        cases.append(f'{{"about": {json.dumps(case["about"])}, "rows": [\n{rows}]}}')
    return text.replace('"cases": []', '"cases": [\n' + ",\n".join(cases) + "\n]") + "\n"
