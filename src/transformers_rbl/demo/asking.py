"""A question asked of both models: answers, visual tokens, prefill time, KV cache, and what every token looks like."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageOps

from ..evaluation.evaluate import OFF, prompt_inputs
from ..evaluation.explain import Explanation, nearest_prototypes
from ..evaluation.questions import Question
from ..evaluation.timing import compare_prefills
from ..inputs import image_arguments, image_runs, layout_of
from ..models.layout import PATCH, VisualLayout
from ..models.pruning import PruningConfig
from ..models.seam import MASKS, TOKENS
from .loading import FIELDS, GUESSES, RATIO, Demo


REPEATS = 3  # timed prefills of each, after one that warms up
MAX_NEW_TOKENS = 64
NEAREST = 3  # prototypes that a click shows
UNKNOWN = {"image": "", "position": "-1", "word_1": "", "word_2": "", "word_3": ""}


@dataclass
class Side:
    """What one of both models did.

    Args:
        answer (`str`): what it said.
        tokens (`int`): visual tokens that its language model saw.
        seconds (`float`): median time of a prefill, image included.
        cache (`int`): bytes of the KV cache after it.
    """

    answer: str
    tokens: int
    seconds: float
    cache: int


@dataclass
class Answer:
    """A question asked of both models, and what a click on a patch looks up.

    Args:
        image (`PIL.Image.Image`): the part of the photo that the tokens show.
        stock, pruned ([`Side`]): both models.
        keep_mask (`torch.BoolTensor` of shape `(L,)`): the visual tokens that stayed.
        grids (`dict[str, torch.LongTensor]`): `"base"` and, with tiles, `"tiles"`: `(rows, columns)` places of tokens.
            Empty where nothing tells where the image's tiles lie.
        explanations (`list[list[Explanation]]`): the nearest prototypes of all L tokens, the most similar first.
        scores (`tuple[float, float, float]`): least and greatest score, and the greatest one kept.
    """

    image: Image.Image
    stock: Side
    pruned: Side
    keep_mask: torch.Tensor
    grids: dict[str, torch.Tensor]
    explanations: list[list[Explanation]]
    scores: tuple[float, float, float]


def pruning_of(demo: Demo, setting: str, value: float) -> PruningConfig:
    """The slider as settings: the model's own, but for keep ratio and threshold, and scored by cosine.

    Args:
        demo ([`Demo`]): whose model.
        setting (`str`): `"keep ratio"` or `"threshold"`.
        value (`float`): the slider's.

    Raises:
        ValueError: for a setting out of range.
    """
    if setting not in FIELDS:
        raise ValueError(f"Choose {' or '.join(FIELDS)}, not {setting}.")
    limits = {**dict.fromkeys(FIELDS.values()), FIELDS[setting]: value}
    return replace(demo.model.pruning or OFF, **limits, score="cosine", enabled=True)


def seen_part(demo: Demo, image: Image.Image, layout: VisualLayout | None) -> Image.Image:
    """The part of an image that its tokens show: all of it, its central square where the processor crops, or more than
    it where the processor pads.

    Args:
        demo ([`Demo`]): whose processor.
        image (`PIL.Image.Image`): the photo.
        layout ([`VisualLayout`], *optional*): where its tokens lie.
    """
    if layout is None or layout.grid is not None or (layout.kinds != PATCH).any():
        return image  # any shape, or tiles
    processor, edges = demo.processor.image_processor, image.size
    can_crop = getattr(processor, "do_center_crop", None)
    if can_crop is not None and getattr(processor, "do_pad", False):
        return ImageOps.pad(image, (max(edges), max(edges)))
    return ImageOps.fit(image, (min(edges), min(edges))) if can_crop else image


@torch.no_grad()
def ask(
    demo: Demo,
    image: Image.Image | None,
    question: str | None,
    setting: str = RATIO,
    value: float = GUESSES[RATIO],
    repeats: int = REPEATS,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Answer:
    """Ask both models. Settings travel with the calls: any number of threads may ask at once.

    Args:
        demo ([`Demo`]): model, processor and codebook.
        image (`PIL.Image.Image`, *optional*): the photo; None raises.
        question (`str`, *optional*): an empty one raises.
        setting (`str`): `"keep ratio"` or `"threshold"`.
        value (`float`): of the setting.
        repeats (`int`): timed prefills of each, stock and pruned in turn.
        max_new_tokens (`int`): length of an answer; decoding is greedy.

    Raises:
        ValueError: without image or question, for a setting out of range, or a question with an image's placeholder.
    """
    if image is None:
        raise ValueError("Pick or upload an image first.")
    question = (question or "").strip()
    if not question:
        raise ValueError("Ask a question first.")
    special = [getattr(demo.processor, name, None) for name in ("image_token", "video_token")]
    if any(token and token in question for token in special):
        raise ValueError("A question is plain text: take the image's placeholder out.")
    model, pruning = demo.model, pruning_of(demo, setting, value)
    inputs = prompt_inputs(demo.processor, Question([image], question, []), "", model.device, model.dtype)
    seconds, cache, output = compare_prefills(model, inputs, {"stock": OFF, "pruned": pruning}, repeats)
    keep_mask = torch.cat(list(output[MASKS["image"]])).cpu()
    sides = {}
    for name, rule, tokens in (("stock", OFF, len(keep_mask)), ("pruned", pruning, int(keep_mask.sum()))):
        ids = model.generate(**inputs, pruning=rule, max_new_tokens=max_new_tokens, do_sample=False)
        answer = demo.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        sides[name] = Side(answer.strip(), tokens, seconds[name], cache[name])
    images = image_arguments(model, inputs)
    encoded = model.base_model.get_image_features(**images, pruning=OFF, return_dict=True)[TOKENS]
    entries = model.family.split(model.config, list(encoded))
    runs = image_runs(model, inputs["input_ids"])
    layout = layout_of(model.model.layouts(**images), [len(tokens) for tokens in entries], runs)
    features = torch.cat(entries)
    provenance = demo.provenance or [UNKNOWN] * len(model.codebook.prototypes)
    explanations = nearest_prototypes(model.codebook, features, provenance, NEAREST)
    scores = torch.tensor([ranked[0].score for ranked in explanations])
    patches = torch.ones_like(keep_mask) if layout is None else layout.scored(OFF)
    return Answer(
        image=seen_part(demo, image, layout),
        stock=sides["stock"],
        pruned=sides["pruned"],
        keep_mask=keep_mask,
        grids={} if layout is None else layout.grids,
        explanations=explanations,
        scores=(float(scores[patches].min()), float(scores[patches].max()), float(scores[patches & keep_mask].max())),
    )


def figures(answer: Answer) -> str:
    """Tokens, time and memory of both models as a Markdown table, and the scores' range."""
    stock, pruned = answer.stock, answer.pruned
    low, high, kept = answer.scores
    rows = [
        ("visual tokens", f"{stock.tokens}", f"{pruned.tokens}", pruned.tokens / stock.tokens),
        (
            f"prefill (vision tower and language model), median of {REPEATS}",
            f"{stock.seconds * 1e3:.1f} ms",
            f"{pruned.seconds * 1e3:.1f} ms",
            pruned.seconds / stock.seconds,
        ),
        ("KV cache", f"{stock.cache / 2**20:.2f} MiB", f"{pruned.cache / 2**20:.2f} MiB", pruned.cache / stock.cache),
    ]
    lines = ["| | stock | pruned | pruned / stock |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {name} | {before} | {after} | {share:.0%} |" for name, before, after, share in rows]
    scores = f"This image's tokens score {low:.2f} to {high:.2f}; the highest score kept is {kept:.2f}."
    if not answer.grids:
        scores += " Where its tiles lie in the photo is not known, so none of its patches is shown."
    return "\n".join([*lines, "", scores])
