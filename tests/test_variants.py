"""Recipe variants: what is called better is so beyond its interval, and only what holds on test scenes counts."""

import json

from testbeds.variants import BASE, ORACLE, RETENTIONS, page, verdicts


def content(split, gains):
    """Two checkpoints of 20 scenes of one question; a variant answers `gains[variant][checkpoint]` scenes more."""
    cases = []
    for place, name in enumerate(("one", "two")):
        rows = {}
        for variant, more in {BASE: (0, 0), **gains, ORACLE: (8, 8)}.items():
            right = "1" * (10 + more[place]) + "0" * (10 - more[place])
            rows[variant] = {"prototypes": 5, "right": {str(ratio): right for ratio in RETENTIONS}}
        cases.append({"name": name, "questions": 1, "rows": rows})
    about = {
        "split": split,
        "scenes": 20,
        "seed": 1,
        "recipe": "digits",
        "machine": "here",
        "date": "today",
        "command": "x",
    }
    return json.loads(json.dumps({"about": about, "cases": cases}))


def test_a_variant_wins_where_it_is_better_beyond_its_interval():
    won = verdicts(content("validation", {"often": (8, 8), "once": (8, 1), "never": (-3, 0)})["cases"])
    assert won == {"often": ["one", "two"], "once": ["one"], "never": []}


def test_what_does_not_hold_on_test_scenes_does_not_count():
    found = content("validation", {"often": (8, 8)})
    assert "**often: again on test scenes.**" in page([found, content("test", {"often": (8, 8)})])
    text = page([found, content("test", {"often": (0, 1)})])
    assert "**No change held on test scenes.**" in text and "beyond the interval: **often**" in text
    assert "Nothing is better" not in page([found]) and "test scenes.**" not in page([found])


def test_a_codebook_without_prototypes_is_shown_with_the_reason():
    found = content("validation", {})
    found["cases"][0]["rows"]["empty"] = {"prototypes": 0, "error": "No prototype is left.", "right": {}}
    assert "| empty | No prototype is left. |" in page([found])
