"""Rules that say which visual tokens stay, of a testbed's encoded examples.

Beside the rules that the library has, some that it does not offer: token norms, an oracle that knows where what is
asked about lies, and codebooks of tokens that were not selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.models.codebook import choose
from transformers_rbl.models.merging import Choice
from transformers_rbl.models.pruning import select_tokens
from transformers_rbl.models.scorers import scorer_arguments

from .encoding import Encoded, Kept


RETENTIONS = (0.5, 0.33, 0.22, 0.15, 0.1, 0.05)

Choose = Callable[[Sequence[Encoded]], list[Kept]]


def keep_all(batch: Sequence[Encoded]) -> list[Kept]:
    return [item.left(torch.ones(len(item.tokens), dtype=torch.bool)) for item in batch]


def keep_none(batch: Sequence[Encoded]) -> list[Kept]:
    return [item.left(torch.zeros(len(item.tokens), dtype=torch.bool)) for item in batch]


def reads_question(score: str) -> bool:
    return "question" in scorer_arguments(score)


def library_rule(rule: PruningConfig, book: RedundancyCodebook | None) -> Choose:
    """A rule of the library, by its own code; images of one size are scored together."""

    def chosen(batch: Sequence[Encoded]) -> list[Kept]:
        scored = [[inputs for _, inputs in item.scored()] for item in batch]
        choices = iter(choose([inputs for images in scored for inputs in images], rule, book))
        return [item.chosen([next(choices) for _ in images]) for item, images in zip(batch, scored)]

    return chosen


def scored_rule(score: Callable[[Encoded], torch.Tensor], ratio: float) -> Choose:
    """Keeps the tokens of lowest `score(encoded)` `(n,)`."""
    rule = PruningConfig(keep_ratio=ratio)

    def lowest(item: Encoded) -> Kept:
        values = score(item)
        return item.chosen([Choice(select_tokens(values[rows], rule)) for rows, _ in item.scored()])

    return lambda batch: [lowest(item) for item in batch]


def oracle(encoded: Encoded) -> torch.Tensor:
    """Tokens that show what questions ask about first, those with more of it before others; ties by chance."""
    noise = torch.rand(len(encoded.tokens), generator=torch.Generator().manual_seed(0))
    return -encoded.subject + 0.01 * noise


def unselected_codebooks(
    train: Sequence[Encoded], count: int, subject: str, seed: int = 0
) -> dict[str, RedundancyCodebook]:
    """Codebooks of `count` tokens that no experiment chose: drawn from all training tokens, or from those that show
    what questions ask about (the `subject`)."""
    tokens = torch.cat([encoded.tokens[encoded.group >= 0] for encoded in train])
    shares = torch.cat([encoded.subject[encoded.group >= 0] for encoded in train])
    generator = torch.Generator().manual_seed(seed)
    books = {}
    for name, pool in (("random tokens", tokens), (f"{subject} tokens", tokens[shares >= 0.5])):
        rows = torch.randperm(len(pool), generator=generator)[:count]
        books[name] = RedundancyCodebook(pool[rows])
    return books


def rules_of(
    books: dict[str, RedundancyCodebook],
    first: Encoded,
    thresholds: Sequence[float],
    train: Sequence[Encoded],
    subject: str,
    unselected: int = 100,
) -> list[tuple[str, float, Choose]]:
    """`(name, retention wanted, choose)` of every rule; the first book is the one that the library would use. Those
    that no experiment chose are as large, or of `unselected` tokens if there are no books."""
    main = next(iter(books.values()), None)
    size = unselected if main is None else len(main.prototypes)
    everything = {**books, **unselected_codebooks(train, size, subject)}
    rules = []
    for ratio in RETENTIONS:
        for name, book in everything.items():
            rules.append((f"codebook: {name}", ratio, library_rule(PruningConfig(keep_ratio=ratio), book)))
        if main is not None:
            double = PruningConfig(keep_ratio=ratio, score="double_softmax")
            rules.append(("codebook, double softmax", ratio, library_rule(double, main)))
        scores = ["random", "diversity"]
        readers = {"cls_similarity": ("cls_similarity_high", "cls_similarity_low"), "cls_attention": ("cls_attention",)}
        scores += [score for name, scores in readers.items() if name in first.measures for score in scores]
        for score in scores:
            rules.append((score, ratio, library_rule(PruningConfig(keep_ratio=ratio, score=score), None)))
        rules.append(("token norm", ratio, scored_rule(lambda encoded: -encoded.tokens.norm(dim=-1), ratio)))
        rules.append(("oracle", ratio, scored_rule(oracle, ratio)))
    for value in thresholds:
        rules.append(("codebook, threshold", value, library_rule(PruningConfig(threshold=value), main)))
    return rules
