"""A case's questions as its processor prepares them, one prompt or two in a batch."""

from __future__ import annotations

from transformers import AutoProcessor, BatchFeature

from ..answering import frame_of
from .cases import Case


def two_prompts(case: Case) -> list[BatchFeature]:
    """Two prompts of different lengths and questions, about images: as one batch, and each alone."""
    processor = AutoProcessor.from_pretrained(case.checkpoint)
    processor.tokenizer.padding_side = "left"
    kind = case.testbed.kinds[case.family][0]  # every checkpoint is asked about images
    examples = list(case.testbed.examples(case.family, kind, "validation", 2, 7))
    texts = [frame_of(case.family).prompt(each, each.questions[n][1]) for n, each in enumerate(examples)]

    def prepared(rows: slice) -> BatchFeature:
        images = [example.pictures() for example in examples[rows]]
        return processor(images=images, text=texts[rows], padding=True, return_tensors="pt")

    return [prepared(slice(0, 2)), prepared(slice(0, 1)), prepared(slice(1, 2))]
