"""Accuracy of a testbed model under many pruning rules at equal retention, on one pass of the vision tower.

python scripts/testbeds compare-rules MODEL --kind image --codebook codebook=FOLDER --out results.json

Beside the rules that the library has, this compares with some that it does not offer: the vision tower's [cls]
attention, token norms, an oracle that knows where the digits are, and codebooks of tokens that were not selected.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from tqdm import tqdm
from transformers import AutoTokenizer

from transformers_rbl import PruningConfig, RedundancyCodebook, rbl_class
from transformers_rbl.models.codebook import keep_mask
from transformers_rbl.models.pruning import select_tokens

from .digits import data
from .digits.data import PATCH, TILE, Example
from .digits.training import answer, digit_shares, token_centres, visual_inputs


OFF = PruningConfig(enabled=False)
RETENTIONS = (0.5, 0.33, 0.22, 0.15, 0.1, 0.05)
BATCH = 50


@dataclass
class Encoded:
    """An example's visual tokens in the order of its prompt, and what rules may know of them.

    Args:
        tokens (`torch.Tensor` of shape `(n, d)`): unpruned.
        lengths (`list[int]`): how many of them each image has; a video counts as one.
        group (`torch.LongTensor` of shape `(n,)`): image or frame of each token, -1 for row ends.
        digit (`torch.FloatTensor` of shape `(n,)`): share of the token's patches that a digit touches.
        cls_similarity, cls_attention (`torch.FloatTensor` of shape `(n,)`, *optional*): for towers with a [cls] token.
    """

    example: Example
    tokens: torch.Tensor
    lengths: list[int]
    group: torch.Tensor
    digit: torch.Tensor
    cls_similarity: torch.Tensor | None = None
    cls_attention: torch.Tensor | None = None

    def kept(self, choose) -> torch.Tensor:
        """`(n,)` bool: what `choose(rows, group)` keeps of each image's or frame's tokens, and all row ends."""
        mask = self.group < 0
        for group in range(int(self.group.max()) + 1):
            rows = torch.nonzero(self.group == group)[:, 0]
            mask[rows] = choose(rows, group)
        return mask


@torch.no_grad()
def encode_all(model, family: str, examples: list[Example]) -> list[Encoded]:
    """Visual tokens and measures of every example."""
    model.set_attn_implementation({"vision_config": "eager"})  # attention maps, for the comparison only
    found: dict[int, Encoded] = {}
    sizes: dict[tuple, list[int]] = {}
    for index, example in enumerate(examples):
        sizes.setdefault(example.images[0].shape, []).append(index)
    for indices in sizes.values():
        for start in range(0, len(indices), 16):
            part = indices[start : start + 16]
            for index, encoded in zip(part, _encode(model, family, [examples[i] for i in part]), strict=True):
                found[index] = encoded
    model.set_attn_implementation({"vision_config": "sdpa"})
    return [found[index] for index in range(len(examples))]


def _encode(model, family: str, batch: list[Example]) -> list[Encoded]:
    inputs = visual_inputs(family, batch)
    if batch[0].video:
        features = model.get_video_features(**inputs, return_dict=True, pruning=OFF).pooler_output
    else:
        features = model.get_image_features(**inputs, return_dict=True, pruning=OFF).pooler_output
    parts = len(features) // len(batch)
    measures = {}
    if family != "llava_onevision":
        seen = model.model.vision_tower(
            inputs["pixel_values"].flatten(0, -4), output_attentions=True, output_hidden_states=True
        )
        hidden = seen.hidden_states[model.config.vision_feature_layer]
        measures["cls_similarity"] = F.cosine_similarity(hidden[:, 1:], hidden[:, :1], dim=-1)
        measures["cls_attention"] = seen.attentions[-1][:, :, 0, 1:].mean(1)
        measures = {name: values.unflatten(0, (len(batch), -1)) for name, values in measures.items()}
    encoded = []
    for row, example in enumerate(batch):
        tokens = torch.cat(list(features[row * parts : (row + 1) * parts]))
        centres = token_centres(family, example)
        assert len(centres) == len(tokens)
        group = _groups(family, example, centres)
        laid = {name: _lay_out(values[row], example, group) for name, values in measures.items()}
        lengths = [len(part) for part in features[row * parts : (row + 1) * parts]]
        encoded.append(Encoded(example, tokens, lengths, group, digit_shares(family, example), **laid))
    return encoded


def _groups(family: str, example: Example, centres: torch.Tensor) -> torch.Tensor:
    ends = centres.isnan().any(1)
    if family != "llava_onevision":
        return torch.where(ends, -1, 0)
    side = TILE[family] // PATCH
    length = ((side + 1) // 2) ** 2 if example.video else side**2 + 1
    return torch.where(ends, -1, torch.arange(len(centres)) // length)


def _lay_out(values: torch.Tensor, example: Example, group: torch.Tensor) -> torch.Tensor:
    """Values per tile `(tiles, side²)` in the order of the tokens, 0 for row ends."""
    found = torch.zeros(len(group))
    if len(values) == 1:
        found[group >= 0] = values[0]
        return found
    side = int(values.shape[1] ** 0.5)
    rows, columns = (length // side for length in example.labels[0].shape)
    grid = values[1:].view(rows, columns, side, side).transpose(1, 2).flatten()
    found[group >= 0] = torch.cat([values[0], grid])
    return found


# --- rules --------------------------------------------------------------------------------------------------------


def library_rule(rule: PruningConfig, book: RedundancyCodebook | None):
    """A rule of the library, by its own code."""

    def choose(encoded: Encoded) -> torch.Tensor:
        def part(rows, group):
            similarity = None if encoded.cls_similarity is None else encoded.cls_similarity[rows]
            return keep_mask(encoded.tokens[rows], rule, book, similarity, group)

        return encoded.kept(part)

    return choose


def scored_rule(score, ratio: float):
    """Keeps the tokens of lowest `score(encoded)` `(n,)`."""

    def choose(encoded: Encoded) -> torch.Tensor:
        values, rule = score(encoded), PruningConfig(keep_ratio=ratio)
        return encoded.kept(lambda rows, group: select_tokens(values[rows], rule))

    return choose


def oracle(encoded: Encoded) -> torch.Tensor:
    """Tokens that touch a digit first, those with more of it before others; ties by chance."""
    noise = torch.rand(len(encoded.tokens), generator=torch.Generator().manual_seed(0))
    return -encoded.digit + 0.01 * noise


def touched(encoded: Encoded) -> float:
    """Share of an example's tokens that a digit touches."""
    return float((encoded.digit[encoded.group >= 0] > 0).float().mean())


def unselected_codebooks(train: list[Encoded], count: int, seed: int = 0) -> dict[str, RedundancyCodebook]:
    """Codebooks of `count` tokens that no experiment chose: drawn from all training tokens, or from digit tokens."""
    tokens = torch.cat([encoded.tokens[encoded.group >= 0] for encoded in train])
    digit = torch.cat([encoded.digit[encoded.group >= 0] for encoded in train])
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, pool in (("random tokens", tokens), ("digit tokens", tokens[digit >= 0.5])):
        rows = torch.randperm(len(pool), generator=generator)[:count]
        found[name] = RedundancyCodebook(pool[rows])
    return found


def rules_of(books: dict[str, RedundancyCodebook], first: Encoded, thresholds: list[float], train: list[Encoded]):
    """`(name, retention wanted, choose)` of every rule; the first book is the one that the library would use."""
    main = next(iter(books.values()))
    everything = {**books, **unselected_codebooks(train, len(main.prototypes))}
    rules = []
    for ratio in RETENTIONS:
        for name, book in everything.items():
            rules.append((f"codebook: {name}", ratio, library_rule(PruningConfig(keep_ratio=ratio), book)))
        double = PruningConfig(keep_ratio=ratio, score="double_softmax")
        rules.append(("codebook, double softmax", ratio, library_rule(double, main)))
        scores = ["random", "diversity"] + ["cls_similarity_high", "cls_similarity_low"] * (
            first.cls_similarity is not None
        )
        for score in scores:
            rules.append((score, ratio, library_rule(PruningConfig(keep_ratio=ratio, score=score), None)))
        if first.cls_attention is not None:
            rules.append(("cls_attention", ratio, scored_rule(lambda encoded: -encoded.cls_attention, ratio)))
        rules.append(("token norm", ratio, scored_rule(lambda encoded: -encoded.tokens.norm(dim=-1), ratio)))
        rules.append(("oracle", ratio, scored_rule(oracle, ratio)))
    for value in thresholds:
        rules.append(("codebook, threshold", value, library_rule(PruningConfig(threshold=value), main)))
    return rules


@torch.no_grad()
def accuracy(model, tokenizer, encoded: list[Encoded], choose) -> tuple[torch.Tensor, list[float]]:
    """Which answers are right, `(examples, questions)` bool, and the share of tokens kept of each example."""
    masks = [choose(item) for item in encoded]
    shares = [float(mask[item.group >= 0].float().mean()) for mask, item in zip(masks, encoded)]
    right = []
    for start in range(0, len(encoded), BATCH):
        part, kept = encoded[start : start + BATCH], masks[start : start + BATCH]
        features = [
            [tokens[mask] for tokens, mask in zip(item.tokens.split(item.lengths), mask.split(item.lengths))]
            for item, mask in zip(part, kept)
        ]
        right.append(answer(model, tokenizer, features, [item.example for item in part])[2])
    return torch.cat(right), shares


def main(
    model: Annotated[Path, typer.Argument(help="A testbed checkpoint.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    kind: Annotated[str, typer.Option(help="image, images or video.")] = "image",
    codebook: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER; the first is the library's. Repeat.")] = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "validation",
    count: Annotated[int, typer.Option(help="Examples, of four questions each.")] = 300,
    seed: Annotated[int, typer.Option(help="Of the examples.")] = 100,
    threshold: Annotated[list[float] | None, typer.Option(help="Cosine thresholds of the first codebook.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Rules to run, by name; default all.")] = None,
) -> None:
    """Compare pruning rules on a testbed model at equal retention."""
    torch.set_num_threads(1)
    loaded = rbl_class(model).from_pretrained(model, pruning={"enabled": False}, dtype="float32").eval()
    family = loaded.config.model_type.removesuffix("_rbl")
    tokenizer = AutoTokenizer.from_pretrained(model)
    began = time.perf_counter()
    encoded = encode_all(loaded, family, list(data.examples(family, kind, split, count, seed)))
    train = encode_all(loaded, family, list(data.examples(family, kind, "train", 60, 1)))
    books = dict(entry.split("=", 1) for entry in codebook or ())
    books = {name: RedundancyCodebook.from_pretrained(folder) for name, folder in books.items()}
    rules = [("unpruned", 1.0, lambda item: torch.ones(len(item.tokens), dtype=torch.bool)),
             ("no image", 0.0, lambda item: torch.zeros(len(item.tokens), dtype=torch.bool))]  # fmt: skip
    rules += rules_of(books, encoded[0], threshold or [], train) if books else []
    rules = [rule for rule in rules if not only or rule[0] in {*only, "unpruned"}]
    results = []
    for name, wanted, choose in tqdm(rules, unit="rule"):
        right, shares = accuracy(loaded, tokenizer, encoded, choose)
        bits = ["".join(str(int(bit)) for bit in row) for row in right]
        results.append({"rule": name, "wanted": wanted, "kept": round(float(np.mean(shares)), 4), "right": bits})
    about = {
        "model": model.name, "family": family, "kind": kind, "split": split, "examples": count, "seed": seed,
        "questions": [name for name, _, _ in encoded[0].example.questions],
        "visual_tokens": round(float(np.mean([int((item.group >= 0).sum()) for item in encoded])), 1),
        "digit_tokens": round(float(np.mean([touched(item) for item in encoded])), 4),
        "prototypes": {name: len(book.prototypes) for name, book in books.items()},
        "seconds": round(time.perf_counter() - began),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"about": about, "results": results}) + "\n")
    base = np.mean([[int(bit) for bit in row] for row in results[0]["right"]])
    for result in results:
        mean = np.mean([[int(bit) for bit in row] for row in result["right"]])
        print(f"{result['rule']:32} {result['wanted']:6} kept {result['kept']:.3f} {mean:.3f} ({mean / base:.1%})")
