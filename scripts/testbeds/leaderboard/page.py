"""The leaderboard's page: tables from the JSON that the command wrote, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from transformers_rbl.evaluation.metrics import bootstrap_interval

from .answers import ORACLE, RESIZED
from .standing import Standing, everywhere, mean_places


FEW = (0.05, 0.03)  # where the target stands: within 2 points of the oracle
TARGET = 2.0
WORDS = {  # of a scorer's arguments
    "unit_prototypes": "codebook",
    "cls_similarity": "[cls] token",
    "cls_attention": "attention of one tower layer",
    "tower_keys": "keys of one tower layer",
    "question": "the question",
}


CAVEATS = (
    "**Resizing**: a tower that takes any size is given a smaller image of the same shape; one of a fixed size a "
    "smaller square (each tile, each frame), its positions interpolated by the stock tower's code. Sides are rounded "
    "up to whole patches, so that resizing has at least as many tokens as the rules (`kept` in the JSON).",
    "One model a checkpoint. Intervals are over scenes.",
)


def page(content: dict[str, Any]) -> str:
    """Markdown of all of it.

    Args:
        content (`dict`): `about`, `cases` (each `about` and `rows`), `times` and `needs`, as the command writes them.
    """
    about, needs, times = content["about"], content["needs"], content["times"]
    standings = [Standing(case["about"], case["rows"]) for case in content["cases"]]
    parts = [
        *heading(about, standings),
        "## Over all checkpoints",
        *over_all(standings, needs),
        "![Accuracy against retention](leaderboard.png)",
        *merging(standings),
        "## Distance to the oracle",
        *distance(standings, needs),
        "## What was kept instead",
        *kept_instead(standings, needs, content["pictured"]),
        "## Time of selection",
        *(selection(times, needs) if times else ["Not measured in this run (`--times 0`)."]),
        "## What a rule needs, and where it runs",
        *requirements(needs),
        "## Accuracy kept, checkpoint by checkpoint",
        *each_checkpoint(standings),
    ]
    return "\n\n".join(parts) + "\n"


def heading(about: dict[str, Any], standings: Sequence[Standing]) -> list[str]:
    caveats = dict.fromkeys(caveat for each in standings for caveat in each.about["caveats"])
    counts = ", ".join(f"{each.about['examples']} of {each.name}" for each in standings)
    return [
        "# Leaderboard: pruning rules at equal retention",
        "Every rule of the library, with and without merging what is dropped into what is kept, on every committed "
        "checkpoint of a trained testbed; beside them the image resized to as many tokens, the unpruned model, and an "
        "oracle that keeps what questions ask about first. Images are encoded once, questions are those of "
        f"[the testbeds](testbed.md), of the **{about['split']}** split.",
        f"```bash\n{about['command']}\n```",
        f"{about['machine']}, torch {about['torch']}, transformers {about['transformers']}, {about['date']}; "
        f"{about['minutes']:.1f} CPU-minutes. Test scenes: {counts}, four questions each, seed {about['seed']}. "
        "This page, its pictures and `leaderboard.json` beside it are written by that command.",
        "## What these figures do not say",
        "\n".join(f"- {caveat}" for caveat in [*caveats, *CAVEATS]),
    ]


def over_all(standings: Sequence[Standing], needs: dict[str, dict]) -> list[str]:
    ratios, places = standings[0].retentions, mean_places(standings, standings[0].retentions)
    low = mean_places(standings, [ratio for ratio in ratios if ratio <= 0.15])
    ran = everywhere(standings)
    rows = []
    for name, place in places.items():
        where = [each for each in standings if name in each.rules]
        shares = {
            ratio: 100 * statistics.mean(each.share(name, ratio) for each in where)
            for ratio in ratios
            if name in where[0].at(ratio)
        }
        label = f"**{name}**" if uses_codebook(name, needs) else name
        label += "" if name in ran else f" ({len(where)} of {len(standings)} checkpoints)"
        cells = [f"{shares[ratio]:.1f}" if ratio in shares else "" for ratio in ratios]
        rows.append([label, f"{place:.1f}", f"{low[name]:.1f}" if name in low else "", *cells])
    oracle = [statistics.mean(each.share(ORACLE, ratio) for each in standings) for ratio in ratios]
    rows.append(["*oracle*", "", "", *(f"{100 * share:.1f}" for share in oracle)])
    winners = [[f"{ratio:.0%}", *(each.best(ratio) for each in standings)] for ratio in ratios]
    return [
        f"Mean accuracy kept over {len(standings)} checkpoints (a video and several images count as one each), in "
        "percent of the unpruned model's; place among the rules that ran on all of them, over all retentions and over "
        "those of 15% and less. Rules in bold read the codebook. Means over so few checkpoints have no interval: "
        "those are in the tables of each checkpoint.",
        table(["rule", "mean place", "at ≤ 15%", *(f"{ratio:.0%}" for ratio in ratios)], rows),
        "The best rule by checkpoint and retention (what is not worse than it beyond its interval is in bold below):",
        table(["retention", *(each.name for each in standings)], winners),
    ]


def merging(standings: Sequence[Standing]) -> list[str]:
    """What merging adds to each rule, over all scenes of all checkpoints."""
    merged_at = {wanted for each in standings for (_, wanted), run in each.runs.items() if run.merge != "none"}
    ratios = sorted(merged_at, reverse=True)
    pairs = [
        (run.rule, name)
        for name, run in {name: run for each in standings for (name, _), run in each.runs.items()}.items()
        if run.merge != "none"
    ]
    if not pairs:
        return []
    rows = []
    for plain, merged in pairs:
        cells = []
        for ratio in ratios:
            gaps = [
                100 * (each.runs[(merged, ratio)].accuracy - each.runs[(plain, ratio)].accuracy)
                for each in standings
                if merged in each.rules
            ]
            low, high = stratified_interval(gaps)
            cells.append(f"{np.mean([gap.mean() for gap in gaps]):+.1f} [{low:+.1f}, {high:+.1f}]")
        rows.append([merged, *cells])
    return [
        "## What merging adds",
        "Accuracy with what is dropped merged into what is kept, minus that of the rule alone, in points; mean over "
        "checkpoints, with a 95% interval over scenes within each. A rule that merges by itself (visionzip, prumerge, "
        "tome) merges to the nearest instead. A dropped token is averaged into whichever kept token is nearest: where "
        "few stay, and all of them show what is asked about, the backdrop is averaged into just those.",
        table(["rule", *(f"{ratio:.0%}" for ratio in ratios)], rows),
    ]


def stratified_interval(groups: Sequence[np.ndarray], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of the groups' means, resampling within each."""
    random = np.random.default_rng(seed)
    means = [group[random.integers(0, len(group), (draws, len(group)))].mean(1) for group in groups]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return float(low), float(high)


def distance(standings: Sequence[Standing], needs: dict[str, dict]) -> list[str]:
    """How far the best rule that reads the codebook is from the oracle where few tokens stay."""
    rows, missed = [], []
    for standing in standings:
        for ratio in (ratio for ratio in FEW if ratio in standing.retentions):
            names = [name for name in standing.at(ratio) if uses_codebook(name, needs)]
            others = [name for name in standing.at(ratio) if name not in names]
            if not names:
                continue
            best, rival = standing.best(ratio, names), standing.best(ratio, others)
            to_oracle, lead = standing.gap(best, ORACLE, ratio), standing.gap(best, rival, ratio)
            if to_oracle[0] < -TARGET:
                missed.append(f"{standing.name} at {ratio:.0%}")
            rows.append([standing.name, f"{ratio:.0%}", best, points(to_oracle), rival, points(lead)])
    verdict = f"missed on {', '.join(missed)}" if missed else "met on every checkpoint"
    return [
        f"Aim: at {' and '.join(f'{ratio:.0%}' for ratio in FEW)} the best rule with a codebook is within {TARGET:.0f} "
        f"points of the oracle. It is **{verdict}**. (The best of several rules is a little better than it deserves: "
        "it was picked on the same scenes. Both columns of points are accuracy, paired over scenes, with 95% "
        "intervals.)",
        table(
            ["checkpoint", "retention", "best with a codebook", "minus oracle", "best without", "lead over that"], rows
        ),
    ]


def kept_instead(standings: Sequence[Standing], needs: dict[str, dict], pictured: dict[str, Any]) -> list[str]:
    """What the tokens that were kept show, of the oracle and of the best rules."""
    rows = []
    for standing in standings:
        for ratio in (ratio for ratio in FEW if ratio in standing.retentions):
            with_book = [name for name in standing.at(ratio) if uses_codebook(name, needs)]
            without = [name for name in standing.at(ratio) if name not in with_book and name != RESIZED]
            best = [standing.best(ratio, names) for names in (with_book, without) if names]
            for name in [ORACLE, *best]:
                run = standing.runs[(name, ratio)]
                shows = ", ".join(f"{kind} {share:.0%}" for kind, share in run.shows.items())
                rows.append([standing.name, f"{ratio:.0%}", name, f"{run.found or 0:.0%}", shows])
    picture = []
    if pictured["checkpoints"]:
        picture = [
            f"Of {pictured['of']} scenes, the image of which the best rule with a codebook kept least of the answer at "
            f"{pictured['at']:.0%}, beside the oracle; in red, what was asked about and dropped.",
            "![What the oracle keeps, and what the codebook keeps](leaderboard-kept.png)",
        ]
    return [
        "Where points are lost to the oracle: the share of what questions ask about (digits, in patches) that is among "
        "the kept tokens, and what the kept tokens show. A rule that keeps decoys has no prototype for them: they say "
        "something to the model, though no question asks about it. The oracle knows the questions.",
        table(["checkpoint", "retention", "rule", "of the answer kept", "the kept tokens show"], rows),
        *picture,
    ]


def selection(times: dict[str, dict[str, float]], needs: dict[str, dict]) -> list[str]:
    lengths = list(times)
    rows = [
        [
            f"**{score}**" if uses_codebook(score, needs) else score,
            *(f"{times[length][score]:.2f}" for length in lengths),
        ]
        for score in sorted(needs, key=lambda score: times[lengths[0]][score])
    ]
    products = " and ".join(f"{times[length]['product']:.0f} ms at {length}" for length in lengths)
    return [
        "Median of paired rounds (a fifth as many at 2,880 tokens), as a multiple of the bare matrix product of a "
        f"codebook with the tokens, 454 prototypes of width 4,096 ({products}; CPU time of one thread, float32): from "
        "the tokens to the mask, 11% kept. What the vision tower computes for a rule (attention, keys) is not in it.",
        table(["rule", *(f"{int(length):,} tokens" for length in lengths)], rows),
    ]


def requirements(needs: dict[str, dict]) -> list[str]:
    rows, why = [], {}
    for score, need in needs.items():
        ran = [name for name, refused in need["refused"].items() if refused is None]
        for name, refused in need["refused"].items():
            if refused is not None:
                why.setdefault(refused, []).append(f"{score} on {name}")
        served = [need["served"][name] is None for name in ran]
        rows.append(
            [
                score,
                ", ".join(WORDS.get(name, name) for name in need["reads"]) or "the tokens alone",
                tick(need["batches"][name] for name in ran),
                "yes" if need["question_free"] else "no",
                "yes" if need["question_free"] else "no",
                tick(need["counts"][name] for name in ran),
                tick(served),
                "yes" if need["threshold"] else "no",
                f"{len(ran)} of {len(need['refused'])}",
            ]
        )
    columns = ["rule", "reads", "batches", "question-free", "prefix caching", "counts in advance", "vLLM", "threshold"]
    lines = [
        "Told by the library, by a scorer's arguments and by trying on the committed checkpoints: two prompts of "
        "different lengths in one batch keep what each keeps alone (*batches*); the number of kept tokens is what the "
        "layout said before the image was encoded (*counts in advance*); the settings are such that an engine can "
        "serve them (*vLLM*). A rule that reads the question cannot keep an image's tokens for a second question "
        "(*prefix caching*).",
        table([*columns, "checkpoints"], rows),
    ]
    if why:
        lines.append("\n".join(f"- {', '.join(pairs)}: “{sentence}”" for sentence, pairs in why.items()))
    lines.append("\n".join(f"- `{score}`: {need['title']}" for score, need in needs.items()))
    return lines


def each_checkpoint(standings: Sequence[Standing]) -> list[str]:
    parts = []
    for standing in standings:
        ratios, about = standing.retentions, standing.about
        low, high = bootstrap_interval(standing.unpruned.accuracy)
        places = mean_places([standing], ratios)
        columns = ["rule", *(f"{ratio:.0%}" for ratio in ratios)]
        best = {ratio: standing.best(ratio) for ratio in ratios}
        shares, gaps = [], []
        for name in [ORACLE, *places]:
            cells, differences = [], []
            for ratio in ratios:
                if (name, ratio) not in standing.runs:
                    cells, differences = [*cells, ""], [*differences, ""]
                    continue
                below, above = (100 * end for end in standing.interval(name, ratio))
                gap = standing.gap(name, best[ratio], ratio)
                tied = name != ORACLE and gap[1] <= 0 <= gap[2]
                value = f"{100 * standing.share(name, ratio):.1f}"
                cells.append(f"{f'**{value}**' if tied else value} [{below:.1f}, {above:.1f}]")
                differences.append("best" if name == best[ratio] else points(gap))
            shares.append([f"*{name}*" if name == ORACLE else name, *cells])
            gaps.append([f"*{name}*" if name == ORACLE else name, *differences])
        parts += [
            f"### {standing.name}",
            f"{about['examples']} {about['split']} scenes of {about['kind']}, questions "
            f"{', '.join(about['questions'])}; {about['visual_tokens']:.0f} visual tokens, of which a "
            f"{about['subject']} touches {about['subject_tokens']:.1%}; {about['prototypes']} prototypes. Unpruned "
            f"accuracy **{100 * standing.unpruned.accuracy.mean():.1f}%** [{100 * low:.1f}, {100 * high:.1f}], "
            f"without the image {100 * standing.blind.accuracy.mean():.1f}%. Accuracy kept in percent of the unpruned "
            "one, with 95% intervals over scenes; in bold, whatever is not worse than the best rule beyond its paired "
            "interval.",
            table(columns, shares),
            '<details markdown="1"><summary>Differences to the best rule, in points of accuracy, paired</summary>',
            table(columns, gaps),
            "</details>",
        ]
    return parts


def uses_codebook(name: str, needs: dict[str, dict]) -> bool:
    return "unit_prototypes" in needs.get(name.split(",")[0], {}).get("reads", ())


def points(gap: tuple[float, float, float]) -> str:
    return f"{gap[0]:+.1f} [{gap[1]:+.1f}, {gap[2]:+.1f}]"


def tick(values: Any) -> str:
    """Whether something held everywhere, nowhere, or on some."""
    held = list(values)
    return "yes" if held and all(held) else "no" if not any(held) else f"{sum(held)} of {len(held)}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
