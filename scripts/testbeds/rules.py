"""Rules that say which visual tokens stay, of a testbed's encoded examples.

Beside the rules that the library has, some that it does not offer: the vision tower's [cls] attention, token norms, an
oracle that knows where what is asked about lies, and codebooks of tokens that were not selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.models.codebook import keep_mask
from transformers_rbl.models.pruning import select_tokens
from transformers_rbl.models.scorers import scorer_arguments

from .encoding import Encoded, Kept


MERGES = ("none",)
RETENTIONS = (0.5, 0.33, 0.22, 0.15, 0.1, 0.05)

Choose = Callable[[Encoded], Kept]


def keep_all(encoded: Encoded) -> Kept:
    return encoded.left(torch.ones(len(encoded.tokens), dtype=torch.bool))


def keep_none(encoded: Encoded) -> Kept:
    return encoded.left(torch.zeros(len(encoded.tokens), dtype=torch.bool))


def chosen_tokens(
    tokens: torch.Tensor,
    rule: PruningConfig,
    book: RedundancyCodebook | None,
    measures: dict[str, torch.Tensor],
    frame: int = 0,
) -> torch.Tensor:
    """`(L,)` bool: what a rule of the library keeps of the tokens `(L, d)` of one image or frame; `measures` by the
    names of a scorer's arguments."""
    similarity = measures["cls_similarity"] if rule.needs_cls_similarity else None
    return keep_mask(tokens, rule, book, similarity, frame)


def reads_question(score: str) -> bool:
    return "question" in scorer_arguments(score)


def library_rule(rule: PruningConfig, book: RedundancyCodebook | None) -> Choose:
    """A rule of the library, by its own code."""

    def choose(encoded: Encoded) -> Kept:
        def part(rows: torch.Tensor, group: int) -> torch.Tensor:
            measures = {name: values[rows] for name, values in encoded.measures.items()}
            return chosen_tokens(encoded.tokens[rows], rule, book, measures, group)

        return encoded.left(encoded.chosen(part))

    return choose


def scored_rule(score: Callable[[Encoded], torch.Tensor], ratio: float) -> Choose:
    """Keeps the tokens of lowest `score(encoded)` `(n,)`."""

    def choose(encoded: Encoded) -> Kept:
        values, rule = score(encoded), PruningConfig(keep_ratio=ratio)
        return encoded.left(encoded.chosen(lambda rows, group: select_tokens(values[rows], rule)))

    return choose


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
        if "cls_similarity" in first.measures:
            scores += ["cls_similarity_high", "cls_similarity_low"]
        for score in scores:
            rules.append((score, ratio, library_rule(PruningConfig(keep_ratio=ratio, score=score), None)))
        if "cls_attention" in first.measures:
            attended = scored_rule(lambda encoded: -encoded.measures["cls_attention"], ratio)
            rules.append(("cls_attention", ratio, attended))
        rules.append(("token norm", ratio, scored_rule(lambda encoded: -encoded.tokens.norm(dim=-1), ratio)))
        rules.append(("oracle", ratio, scored_rule(oracle, ratio)))
    for value in thresholds:
        rules.append(("codebook, threshold", value, library_rule(PruningConfig(threshold=value), main)))
    return rules
