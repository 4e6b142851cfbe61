"""What pruning costs the scenes model: every image is encoded once, all questions of a scene are answered in one pass.

python scripts/testbeds scenes-compare outputs/scenes.json --split test --count 400
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from transformers_rbl import PruningConfig, RedundancyCodebook, kept_token_count, rbl_class
from transformers_rbl.models.seam import MASKS

from ..answering import answer
from ..tokens import Visual
from .asking import SceneExample, draw_example
from .checkpoint import assembled
from .concepts import CONCEPTS
from .tower import pixels_of


OFF = PruningConfig(enabled=False)
RETENTIONS = (0.5, 0.33, 0.22, 0.15, 0.1, 0.05, 0.03)
SCORES = ("random", "diversity", "cls_attention", "cls_similarity_high", "codebook_dpp", "visionzip")
BATCH = 50  # scenes
Pruned = tuple[list[torch.Tensor], torch.Tensor]  # each image's tokens, and which they are: `(images, n)` bool
Rule = Callable[["Encoded"], Pruned]


class Encoded:
    """Some examples through the vision tower once, unpruned.

    Args:
        model (`PreTrainedModel`): the pruned class.
        examples (`Sequence[SceneExample]`).
    """

    def __init__(self, model: PreTrainedModel, examples: Sequence[SceneExample]):
        self.model, self.examples = model, examples
        self.images = {"pixel_values": pixels_of([example.images[0] for example in examples]).to(model.dtype)}
        self.outputs = model.model.get_image_features(
            **self.images, pruning=OFF, output_hidden_states=True, return_dict=True
        )
        self.tokens = torch.stack(list(self.outputs.pooler_output))
        self.runs = [[self.tokens.shape[1]]] * len(examples)

    def by_library(self, pruning: PruningConfig) -> Pruned:
        """What the library keeps by any of its rules."""
        pruned = self.model.model.prune_image_features(self.outputs, pruning, self.runs, **self.images)
        masks = pruned[MASKS["image"]]
        return list(pruned.pooler_output), torch.stack(list(masks))

    def by_masks(self, masks: torch.Tensor) -> Pruned:
        return [tokens[mask] for tokens, mask in zip(self.tokens, masks)], masks


def library_rule(pruning: PruningConfig) -> Rule:
    return lambda encoded: encoded.by_library(pruning)


def keep_all(encoded: Encoded) -> Pruned:
    return encoded.by_masks(torch.ones(encoded.tokens.shape[:2], dtype=torch.bool))


def keep_none(encoded: Encoded) -> Pruned:
    return encoded.by_masks(torch.zeros(encoded.tokens.shape[:2], dtype=torch.bool))


def oracle(ratio: float) -> Rule:
    """Who knows what is where: the patch that shows most of each thing, one of the background, the next of each."""

    def choose(encoded: Encoded) -> Pruned:
        shares = torch.stack([torch.from_numpy(example.subjects()[0]).flatten() for example in encoded.examples])
        noise = torch.rand(shares.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        kept = (shares + noise).topk(kept_token_count(shares.shape[1], ratio)).indices
        return encoded.by_masks(torch.zeros(shares.shape, dtype=torch.bool).scatter_(1, kept, True))

    return choose


def with_codebook(book: RedundancyCodebook, ratio: float) -> Rule:
    """The library's rule with another codebook than the model's."""

    def choose(encoded: Encoded) -> Pruned:
        own, encoded.model.model.codebook = encoded.model.model.codebook, book
        try:
            return encoded.by_library(PruningConfig(keep_ratio=ratio))
        finally:
            encoded.model.model.codebook = own

    return choose


@torch.no_grad()
def ask(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batches: Sequence[Encoded],
    rule: Rule,
    own_positions: bool = False,
) -> dict[str, Any]:
    """Per example, a digit for each question (1 for an answer that is right word for word), what was kept, and of the
    patches that show things the share kept. Positions are closed up, as the library does, or each token's own."""
    right, kept, things = [], [], []
    for encoded in batches:
        tokens, masks = rule(encoded)
        images = [Visual(image).placed(mask) if own_positions else Visual(image) for image, mask in zip(tokens, masks)]
        bits = answer(model, tokenizer, [[image] for image in images], encoded.examples)[2]
        right += ["".join(str(int(bit)) for bit in row) for row in bits]
        kept.append(masks.float().mean())
        shown = torch.stack(
            [torch.from_numpy(example.labels[0] < len(CONCEPTS)).flatten() for example in encoded.examples]
        )
        things += ((masks & shown).sum(1) / shown.sum(1)).tolist()
    return {
        "kept": round(float(torch.stack(kept).mean()), 4),
        "things_kept": round(float(np.mean(things)), 4),
        "right": right,
    }


def rules_of(
    books: dict[str, RedundancyCodebook], scores: Sequence[str], retentions: Sequence[float]
) -> Iterator[tuple[str, float, Rule]]:
    """`(name, retention wanted, rule)`."""
    yield "unpruned", 1.0, keep_all
    yield "no image", 0.0, keep_none
    for ratio in retentions:
        for name, book in books.items():
            yield f"codebook: {name}", ratio, with_codebook(book, ratio)
        for score in scores:
            yield score, ratio, library_rule(PruningConfig(keep_ratio=ratio, score=score))
        yield "oracle", ratio, oracle(ratio)


@torch.no_grad()
def random_tokens(model: PreTrainedModel, count: int, seed: int = 0) -> RedundancyCodebook:
    """As many tokens of training scenes as a codebook has prototypes, drawn by chance."""
    tokens = Encoded(model, [draw_example(1, "train", number) for number in range(60)]).tokens.flatten(0, 1).float()
    return RedundancyCodebook(
        tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:count]]
    )


def main(
    out: Annotated[Path, typer.Argument(help="JSON to write; what it holds already is not asked again.")],
    split: Annotated[Literal["validation", "test"], typer.Option()] = "validation",
    count: Annotated[int, typer.Option(min=1, help="Scenes, of six questions each.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the scenes.")] = 100,
    withheld: Annotated[bool, typer.Option("--withheld", help="Things in drawings never seen in training.")] = False,
    model_folder: Annotated[Path | None, typer.Option("--model", help="Default: put together on first use.")] = None,
    codebook: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of further codebooks; repeat. The first is the model's.")
    ] = None,
    score: Annotated[list[str] | None, typer.Option(help="Rules of the library beside the codebook; repeat.")] = None,
    retention: Annotated[list[float] | None, typer.Option(help="Repeat.")] = None,
    own_positions: Annotated[
        bool, typer.Option("--own-positions", help="Kept tokens keep their positions instead of closing up.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Accuracy of the scenes model under the library's rules, an oracle and no image."""
    torch.set_num_threads(threads)
    folder = model_folder or assembled()
    model = rbl_class(folder).from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [draw_example(seed, split, number, withheld) for number in range(count)]
    began = time.perf_counter()
    with torch.no_grad():
        batches = [Encoded(model, examples[start : start + BATCH]) for start in range(0, count, BATCH)]
    books = {}
    if model.model.codebook is not None:
        books["the model's"] = model.model.codebook
    for entry in codebook or ():
        name, path = entry.split("=", 1)
        books[name] = RedundancyCodebook.from_pretrained(path)
    if books:
        books["random tokens"] = random_tokens(model, len(next(iter(books.values())).prototypes))
    about = {
        "model": folder.name,
        "family": "llava",
        "kind": "image",
        "split": f"{split}, drawings withheld" if withheld else split,
        "examples": count,
        "seed": seed,
        "questions": [kind for kind, _, _ in examples[0].questions],
        "visual_tokens": batches[0].tokens.shape[1],
        "thing_tokens": round(float(np.mean([(example.labels[0] < len(CONCEPTS)).mean() for example in examples])), 4),
        "prototypes": {name: len(book.prototypes) for name, book in books.items()},
    }
    if own_positions:
        about["positions"] = "own"
    content = json.loads(out.read_text()) if out.is_file() else {"about": about, "results": []}
    if content["about"] != about:
        raise typer.BadParameter(f"{out} is about other examples, or another model: {content['about']}.")
    known = {(row["rule"], row["wanted"]) for row in content["results"]}
    rules = list(rules_of(books, score or SCORES, retention or RETENTIONS))
    for name, wanted, rule in tqdm(rules, unit="rule"):
        if (name, wanted) in known:
            continue
        content["results"].append(
            {"rule": name, "wanted": wanted, **ask(model, tokenizer, batches, rule, own_positions)}
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content) + "\n")
    for row in content["results"]:
        bits = np.array([[int(bit) for bit in each] for each in row["right"]])
        kinds = "  ".join(f"{kind} {100 * share:.0f}" for kind, share in zip(about["questions"], bits.mean(0)))
        print(f"{row['rule']:26} {row['wanted']:5} kept {row['kept']:.3f} {100 * bits.mean():5.1f}%  {kinds}")
    print(f"{time.perf_counter() - began:.0f} s")
