"""The testbed of handwritten digits among decoys that no question asks about, on photos and textures.

Digits (`load_digits`) and photos (`load_sample_images`) ship inside scikit-learn, so nothing is downloaded.
"""

from ..testbed import Testbed
from .questions import examples
from .sizes import KINDS
from .training import STAGES, DigitsTrainer


CARD = """Trained from scratch by `scripts/testbeds` on scikit-learn's handwritten digits, among decoys that no question
asks about (`scripts/testbeds/digits`), at the end on parts of images with gaps where no digit is, so that it reads what
pruning leaves. It answers prompts like these, in these words, and nothing else (with the true answers for one
example):"""

DIGITS = Testbed(
    name="digits",
    kinds=KINDS,
    examples=examples,
    stages=STAGES,
    trainer=DigitsTrainer,
    subject="digit",
    card=CARD,
    results="docs/results/testbed.md",
)
