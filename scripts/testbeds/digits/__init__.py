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

CAVEATS = (
    """The digits models are small and trained here. All end their training with a stage that shows them parts of images
with gaps where nothing is asked about; without it most rules lose more, and the oracle too, on all but Qwen3-VL
([how much](testbed.md#without-the-window-stage)). Shares above 100% come of it.""",
    """Digits are small and drawn at one size, and their towers never saw a shrunk one: that is why **resizing** fares
so badly. It says little of a tower that saw things of all sizes.""",
    """[cls] of the digits' towers was taught to name the decoys, not the digits, as a caption leaves small print out:
rules that follow [cls] are shown a case that is hard for them.""",
)

DIGITS = Testbed(
    name="digits",
    kinds=KINDS,
    examples=examples,
    stages=STAGES,
    trainer=DigitsTrainer,
    subject="digit",
    card=CARD,
    results="docs/results/testbed.md",
    caveats=tuple(caveat.replace("\n", " ") for caveat in CAVEATS),
)
