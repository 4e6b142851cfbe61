"""How long a rule takes to choose tokens, as a multiple of the bare matrix product of a codebook."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.models.codebook import choose

from .ledger import Ledger


# Tokens of LLaVA-1.5-7B and of LLaVA-NeXT, their width, the size of a published codebook, heads of CLIP ViT-L.
LENGTHS, WIDTH, PROTOTYPES, TOWER_HEADS = (576, 2880), 4096, 454, (16, 64)
KEPT, QUESTION = 0.11, 16


def selection_times(scores: Sequence[str], rounds: int, ledger: Ledger) -> dict[str, dict[str, float]]:
    """How long rules take from tokens to mask; what a vision tower computes for a rule is not counted.

    Args:
        scores (`Sequence[str]`): rules of the library.
        rounds (`int`): of each, the first of which warms up; a fifth as many at 2,880 tokens, and no warm-up.
        ledger ([`Ledger`]): what is known, and where the rest is written.

    Returns:
        `dict[str, dict[str, float]]`: by number of tokens `"product"`, milliseconds of the bare product
        `(454, 4096) x (4096, tokens)`, and by rule how many times as long it takes. Medians of paired rounds.
    """
    found = {}
    for length in LENGTHS:
        bench, warm = Bench(length), int(length == LENGTHS[0])
        count = rounds if warm else max(1, rounds // 5)
        pairs = {
            score: ledger.get(("times", length, count, score), functools.partial(bench.rounds, score, count, warm))
            for score in scores
        }
        products = [bare for rounds_of_rule in pairs.values() for bare, _ in rounds_of_rule]
        multiples = {score: statistics.median(spent / bare for bare, spent in of) for score, of in pairs.items()}
        medians = {score: round(multiple, 3) for score, multiple in multiples.items()}
        found[str(length)] = {"product": round(1e3 * statistics.median(products), 2), **medians}
    return found


class Bench:
    """Random tokens of which 11% are kept, and all that a scorer may read, made when they are first needed."""

    def __init__(self, length: int):
        self.length = length

    @functools.cached_property
    def book(self) -> RedundancyCodebook:
        return RedundancyCodebook(torch.randn(PROTOTYPES, WIDTH, generator=torch.Generator().manual_seed(0)))

    @functools.cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        random, length = torch.Generator().manual_seed(self.length), self.length
        return {
            "tokens": torch.randn(length, WIDTH, generator=random),
            "cls_similarity": torch.rand(length, generator=random),
            "cls_attention": torch.rand(length, generator=random) / length,
            "tower_keys": torch.randn(length, *TOWER_HEADS, generator=random),
            "question": torch.randn(QUESTION, WIDTH, generator=random),
        }

    @torch.no_grad()
    def rounds(self, score: str, count: int, warm: int) -> list[tuple[float, float]]:
        """Seconds of the bare product and of the rule, one right after the other."""
        rule, pairs = PruningConfig(keep_ratio=KEPT, score=score), []
        for _ in range(count + warm):
            bare = seconds(lambda: self.book.unit_prototypes @ self.inputs["tokens"].T)
            pairs.append((bare, seconds(functools.partial(choose, [self.inputs], rule, self.book))))
        return pairs[warm:]


def seconds(work: Callable) -> float:
    start = time.process_time()  # of one thread: what else the machine runs is not counted
    work()
    return time.process_time() - start
