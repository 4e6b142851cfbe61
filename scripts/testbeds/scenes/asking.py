"""The scenes testbed's examples: a scene and questions in English about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..testbed import SPLITS, Example
from .concepts import CONCEPTS, KIND_OF, LABELS, OUTDOORS, background_phrase, with_article
from .placing import SIDE, Scene, draw_count, draw_scene


NUMBERS = ("none", "one", "two", "three", "four")
PLURALS = {"animal": "animals", "vehicle": "vehicles"}
Asked = tuple[str, str, str]  # kind, question, answer


@dataclass(kw_only=True)
class SceneExample(Example):
    """
    Args:
        scene (`Scene`): what its one image shows.
    """

    scene: Scene

    def subjects(self) -> list[np.ndarray]:
        """How soon an oracle keeps each patch, 1 to 0: of each thing the patch that shows most of it, one of the
        background, then the next of each. What is asked about is all but clutter."""
        label, cover = self.scene.label, self.scene.cover
        order = np.zeros(label.shape, np.float32)
        for name, _, _ in self.scene.things:
            own = np.where(label == CONCEPTS.index(name), cover, 0)
            for rank, place in enumerate(np.argsort(-own, axis=None)[: int((own > 0).sum())]):
                order.flat[place] = 1 / (1 + rank)
        behind = np.flatnonzero((label == LABELS.index(self.scene.background)) & (cover == 0))
        for rank, place in enumerate(behind[np.random.default_rng(0).permutation(len(behind))]):
            order.flat[place] = 1 / (1.5 + rank)
        return [order]


def examples(
    family: str, kind: str, split: str, count: int, seed: int, grid: tuple[int, int] | None = None
) -> Iterator[SceneExample]:
    """`count` examples of a split, each from a generator of its own."""
    if family != "llava" or kind != "image" or grid is not None:
        raise ValueError("The scenes testbed has single images for LLaVA.")
    for number in range(count):
        yield draw_example(seed, split, number)


def draw_example(seed: int, split: str, number: int, withheld: bool = False) -> SceneExample:
    """Example `number` of a split; with `withheld`, of drawings that no training scene shows."""
    random = np.random.default_rng([seed, SPLITS.index(split), number, int(withheld)])
    count, asked = draw_count(random), None
    while asked is None:
        scene = draw_scene(random, split, count, withheld)
        asked = ask(random, scene)
    questions, lessons = asked
    return SceneExample(images=[scene.image], labels=[scene.label], questions=questions, lessons=lessons, scene=scene)


def ask(random: np.random.Generator, scene: Scene) -> tuple[list[Asked], list[Asked]] | None:
    """The questions to evaluate, one of each kind, and further ones of those kinds to learn from; None if the scene
    does not allow every kind."""
    names = [name for name, _, _ in scene.things]
    kinds = {
        "what": [[("What is in the picture?", listed(names))]],
        "exist": [existence(random, names)],
        "count": [counts(names)],
        "place": [
            [(f"Where is the {name}?", side) for name, _, x in scene.things if (side := clear_side(x))],
            on_sides(scene),
        ],
        "which": [
            [
                (f"Which {kind} is there?", with_article(found[0]))
                for kind in ("animal", "food", "vehicle")
                if len(found := [name for name in names if KIND_OF[name] == kind]) == 1
            ]
        ],
        "background": [
            [("What is in the background?", background_phrase(scene.background))],
            [("Is it outdoors?", "yes" if scene.background in OUTDOORS else "no")],
        ],
    }
    questions, lessons = [], []
    for kind, sorts in kinds.items():
        rows = [shuffled(random, found) for found in shuffled(random, sorts) if found]
        if not rows:
            return None
        first, *others = [(kind, *row) for found in rows for row in found]
        questions.append(first)
        lessons += others
    return questions, lessons


def shuffled(random: np.random.Generator, rows: list) -> list:
    return [rows[index] for index in random.permutation(len(rows))]


def existence(random: np.random.Generator, names: list[str]) -> list[tuple[str, str]]:
    """One that is there and one that is not: half of these are of a kind that is."""
    present = names[int(random.integers(len(names)))]
    kin = [name for name in CONCEPTS if name not in names and KIND_OF[name] == KIND_OF[present]]
    others = kin if random.random() < 0.5 else [name for name in CONCEPTS if name not in names]
    absent = others[int(random.integers(len(others)))]
    return [(f"Is there {with_article(present)}?", "yes"), (f"Is there {with_article(absent)}?", "no")]


def counts(names: list[str]) -> list[tuple[str, str]]:
    rows = [("How many things are there?", NUMBERS[len(names)])]
    for kind, plural in PLURALS.items():
        rows.append((f"How many {plural} are there?", NUMBERS[sum(KIND_OF[name] == kind for name in names)]))
    return rows


def clear_side(x: float) -> str | None:
    """Left or right, if it is clear."""
    if abs(x - SIDE / 2) < 14:
        return None
    return "right" if x > SIDE / 2 else "left"


def on_sides(scene: Scene) -> list[tuple[str, str]]:
    """What is on the left and on the right, where that is one thing, and nothing lies near the middle."""
    if any(abs(x - SIDE / 2) < 12 for _, _, x in scene.things):
        return []
    left = [name for name, _, x in scene.things if x < SIDE / 2]
    right = [name for name, _, x in scene.things if x > SIDE / 2]
    return [
        (f"What is on the {side}?", with_article(found[0]))
        for side, found in (("left", left), ("right", right))
        if len(found) == 1
    ]


def listed(names: list[str]) -> str:
    """ "a dog, a car and an apple"."""
    words = [with_article(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def correct(said: str, answer: str) -> bool:
    """Whether an answer names the same things, in any order; articles aside."""
    return content_words(said) == content_words(answer)


def content_words(text: str) -> list[str]:
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return sorted(word for word in words if word not in ("a", "an", "and", "the"))
