"""How long a rule takes to choose tokens, as a multiple of the bare matrix product of a codebook."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from transformers_rbl import PruningConfig, RedundancyCodebook
from transformers_rbl.models.codebook import choose


# Tokens of LLaVA-1.5-7B and of LLaVA-NeXT, their width, the size of a published codebook, heads of CLIP ViT-L.
LENGTHS, WIDTH, PROTOTYPES, TOWER_HEADS = (576, 2880), 4096, 454, (16, 64)
KEPT, QUESTION = 0.11, 16


@torch.no_grad()
def selection_times(length: int, rounds: int, scores: Sequence[str]) -> dict[str, float]:
    """Medians of paired rounds: in each, every rule right after the bare product, so that what else the machine does
    meets both.

    Args:
        length (`int`): how many tokens, random ones; 11% of them are kept.
        rounds (`int`): measured ones, after one that warms up.
        scores (`Sequence[str]`): rules of the library.

    Returns:
        `dict[str, float]`: `"product"`, milliseconds of the bare product `(454, 4096) x (4096, length)`, and by rule
        how many times as long it takes from tokens to mask. What a vision tower computes for a rule is not counted.
    """
    random = torch.Generator().manual_seed(length)
    book = RedundancyCodebook(torch.randn(PROTOTYPES, WIDTH, generator=random))
    tokens = torch.randn(length, WIDTH, generator=random)
    inputs = {
        "tokens": tokens,
        "cls_similarity": torch.rand(length, generator=random),
        "cls_attention": torch.rand(length, generator=random) / length,
        "tower_keys": torch.randn(length, *TOWER_HEADS, generator=random),
        "question": torch.randn(QUESTION, WIDTH, generator=random),
    }
    multiples: dict[str, list[float]] = {score: [] for score in scores}
    products: list[float] = []
    for number in tqdm(range(rounds + 1), desc=f"times at {length} tokens", unit="round"):
        for score in scores:
            rule = PruningConfig(keep_ratio=KEPT, score=score)
            bare = seconds(lambda: book.unit_prototypes @ tokens.T)
            spent = seconds(functools.partial(choose, [inputs], rule, book))
            if number:
                products.append(bare)
                multiples[score].append(spent / bare)
    medians = {score: round(statistics.median(values), 3) for score, values in multiples.items()}
    return {"product": round(1e3 * statistics.median(products), 2), **medians}


def seconds(work: Callable) -> float:
    start = time.process_time()  # of one thread: what else the machine runs is not counted
    work()
    return time.process_time() - start
