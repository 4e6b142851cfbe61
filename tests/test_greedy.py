"""The greedy rules against plain loops in float64, on random and on adversarial tokens."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_rbl import PruningConfig, RedundancyCodebook, kept_token_count
from transformers_rbl.models import greedy
from transformers_rbl.models.codebook import choose, keep_mask
from transformers_rbl.models.greedy import COVERED, DEPENDENT, cosine_matrix
from transformers_rbl.models.scorers import MERGING, score_images, score_tokens


GREEDY = ["diversity", "codebook_dpp", "codebook_coverage"]


def tokens_of(kind, length=40, width=64, seed=0):
    """Random tokens, and those on which a greedy rule may stumble."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(length, width, generator=generator) + torch.randn(width, generator=generator)
    if kind == "duplicates":
        tokens[length // 2 :] = tokens[: length - length // 2]
    elif kind == "all equal":
        tokens = tokens[:1].expand(length, -1).clone()
    elif kind == "zeros":
        tokens[::5] = 0
    elif kind == "few dimensions":  # more tokens than dimensions: all are soon in the span of those chosen
        tokens[:, 6:] = 0
    elif kind == "opposites":
        tokens[1::2] = -tokens[::2]
    elif kind == "bfloat16":
        tokens = tokens.bfloat16()
    return tokens


KINDS = ["random", "duplicates", "all equal", "zeros", "few dimensions", "opposites", "bfloat16"]


@pytest.fixture
def book():
    return RedundancyCodebook(torch.randn(9, 64, generator=torch.Generator().manual_seed(7)))


def unit(vectors):
    vectors = vectors.double().numpy()
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)


def literal_diversity(tokens, book):
    """DivPrune, algorithm 1: the token farthest from its nearest neighbour, then the farthest from all chosen."""
    cosine = unit(tokens) @ unit(tokens).T

    def cost(i, chosen):
        return max((cosine[i, j] for j in (chosen or range(len(tokens))) if j != i), default=0)

    return cost


def dpp_cost(direction, quality):
    """The token with which the determinant of the chosen ones' kernel grows most; those that leave it at zero by
    quality. Their share of the determinant is the squared distance from the span of the chosen ones."""

    def cost(i, chosen):
        basis = np.zeros((64, 0))
        for j in chosen:
            rest = direction[j] - basis @ (basis.T @ direction[j])
            if rest @ rest > DEPENDENT:
                basis = np.column_stack([basis, rest / np.linalg.norm(rest)])
        rest = direction[i] - basis @ (basis.T @ direction[i])
        return -(quality[i] ** 2) * (rest @ rest) if rest @ rest > DEPENDENT else 1 - quality[i] ** 2

    return cost


def literal_dpp(tokens, book):
    direction = unit(tokens)
    return dpp_cost(direction, (1 - (direction @ unit(book.prototypes).T).max(1)) / 2)


def literal_coverage(tokens, book):
    """The token that raises sum_i q_i max_j c_ij most; those that add nothing by quality."""
    direction = unit(tokens)
    cosine = direction @ direction.T
    quality = (1 - (direction @ unit(book.prototypes).T).max(1)) / 2

    def cost(i, chosen):
        before = [max([0, *(cosine[k, j] for j in chosen)]) for k in range(len(tokens))]
        gain = sum(q * max(0, cosine[k, i] - before[k]) for k, q in enumerate(quality)) / sum(quality)
        return -gain if gain > COVERED else 1 - quality[i] / max(quality)

    return cost


LITERAL = {"diversity": literal_diversity, "codebook_dpp": literal_dpp, "codebook_coverage": literal_coverage}


@pytest.mark.parametrize("count", [1, 2, 9, 24])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_rule_is_the_loop_written_from_its_paper(name, kind, count, book):
    """Every choice is one that the loop may make: the best, or as good but for float32's rounding."""
    tokens = tokens_of(kind, length=24)
    scores = book.score(tokens, name, count=count)
    order = scores.argsort(stable=True)[:count].tolist()
    kept = keep_mask(tokens, PruningConfig(keep_ratio=count / 24, score=name), book)
    assert sorted(order) == kept.nonzero()[:, 0].tolist() and len(order) == count
    cost, chosen = LITERAL[name](tokens, book), []
    for pick in order:
        best = min(cost(i, chosen) for i in range(24) if i not in chosen)
        assert cost(pick, chosen) == pytest.approx(best, abs=1e-5)
        assert float(scores[pick]) == pytest.approx(-1 if name == "diversity" and not chosen else best, abs=1e-5)
        chosen.append(pick)


@pytest.mark.parametrize("name", GREEDY)
def test_scores_fall_in_the_order_of_choice_and_fewer_are_a_beginning_of_more(name, book):
    for kind in KINDS:
        tokens = tokens_of(kind)
        every = book.score(tokens, name, count=None)
        some = book.score(tokens, name, count=11)
        assert every.isfinite().all() and int(some.isfinite().sum()) == 11
        assert torch.equal(some[some.isfinite()], every[some.isfinite()])
        assert some[some.isfinite()].max() <= every[~some.isfinite()].min()


@pytest.mark.parametrize("name", GREEDY)
def test_the_order_of_tokens_changes_nothing_but_the_order(name, book):
    tokens, order = tokens_of("random"), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    rule = PruningConfig(keep_ratio=0.3, score=name)
    assert torch.equal(keep_mask(tokens[order], rule, book), keep_mask(tokens, rule, book)[order])


@pytest.mark.parametrize("name", GREEDY)
def test_images_scored_together_are_scored_as_if_alone(name, book):
    """Of two sizes, in any order; also through the call that groups them."""
    images = [tokens_of(kind, seed=seed) for seed, kind in enumerate(KINDS[:5])]
    prototypes = book.unit_prototypes
    given = [{"tokens": tokens, "unit_prototypes": prototypes, "count": 12} for tokens in images]
    for one, together in zip(given, score_images(name, given), strict=True):
        torch.testing.assert_close(together, score_tokens(name, **one), atol=1e-6, rtol=0)
    mixed = [*images, tokens_of("random", length=17), images[0]]
    choices = choose([{"tokens": tokens} for tokens in mixed], PruningConfig(keep_ratio=0.3, score=name), book)
    for tokens, choice in zip(mixed, choices, strict=True):
        assert torch.equal(choice.kept, keep_mask(tokens, PruningConfig(keep_ratio=0.3, score=name), book))


def test_diversity_picks_what_it_picked_before_it_shared_its_engine():
    """The function of 0.1.0."""

    def before(tokens, count):
        unit = torch.nn.functional.normalize(tokens, dim=-1)
        cosines = unit @ unit.T
        cosines.fill_diagonal_(-math.inf)
        scores = torch.full_like(cosines[0], math.inf)
        nearest, chosen = cosines.amax(dim=1), torch.zeros_like(scores, dtype=torch.bool)
        for step in range(count):
            pick = nearest.masked_fill(chosen, math.inf).argmin()
            scores[pick] = nearest[pick] if step else -1.0
            chosen[pick] = True
            nearest = cosines[pick] if step == 0 else torch.maximum(nearest, cosines[pick])
        return scores

    for length, width, count in ((576, 256, 63), (700, 64, 300), (300, 1024, 300), (1, 8, 1)):
        tokens = torch.randn(length, width, generator=torch.Generator().manual_seed(length))
        ours, theirs = score_tokens("diversity", tokens=tokens, count=count), before(tokens, count)
        assert torch.equal(ours.isinf(), theirs.isinf())
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_cosine_matrix_is_symmetric_and_that_of_all_pairs():
    for length in (1, 255, 256, 257, 600):
        tokens = torch.randn(2, length, 16)
        cosines = cosine_matrix(tokens)
        assert torch.equal(cosines, cosines.mT)
        expected = torch.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
        torch.testing.assert_close(cosines, expected, atol=1e-5, rtol=0)


def test_a_threshold_on_the_dpp_keeps_what_still_gains(book):
    tokens = tokens_of("random")
    every = book.score(tokens, "codebook_dpp", count=None)
    kept = keep_mask(tokens, PruningConfig(threshold=-0.05, score="codebook_dpp"), book)
    assert 0 < kept.sum() < 40 and torch.equal(kept, every < -0.05)


def test_quality_drops_prototypes_first(book):
    """Tokens that are prototypes have no quality, however diverse; of near-duplicates one alone stays."""
    prototypes = book.prototypes[:6]
    informative = torch.linalg.qr(torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))[0].T * 8
    tokens = torch.cat([prototypes, informative, informative + 0.01 * torch.randn(3, 64)])
    kept = keep_mask(tokens, PruningConfig(keep_ratio=3 / 12, score="codebook_dpp"), book)
    assert not kept[:6].any() and (kept[6:9] ^ kept[9:]).all()
    assert kept_token_count(12, 3 / 12) == 3


class NoWaiting(TorchDispatchMode):
    """Fails at every operator whose result a device must have computed before the program goes on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique_dim"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*GREEDY, "scope", "cdpruner", "visionzip", "vispruner", "prumerge", "tome"])
def test_on_a_device_no_step_waits_and_the_choices_are_those_of_a_cpu(name, kind, book, monkeypatch):
    """What a device runs, on a CPU: nothing is read back, whatever is chosen; merging and masks neither."""
    tokens = tokens_of(kind)
    own = {"cls_attention": torch.rand(40).softmax(0), "question": torch.randn(3, 64)}
    own["tower_keys"] = torch.randn(40, 2, 6)
    images = [{"tokens": part, **own} for part in (tokens, tokens.flip(0))]
    rule = PruningConfig(keep_ratio=0.3, score=name, merge="none" if name in MERGING else "nearest")
    as_cpu = choose(images, rule, book)
    monkeypatch.setattr(greedy, "_at_once", lambda tensor: False)
    with NoWaiting():
        as_device = choose(images, rule, book)
        merged = [choice.merged(image["tokens"]) for choice, image in zip(as_device, images)]
    assert all(values.shape == tokens.shape for values in merged)
    if kind in ("random", "bfloat16", "few dimensions"):  # of exact ties rounding takes the one or the other
        assert all(torch.equal(one.kept, other.kept) for one, other in zip(as_cpu, as_device))
    assert all(choice.kept.sum() == 12 for choice in as_device)
