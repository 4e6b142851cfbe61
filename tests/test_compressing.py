"""A compressed codebook: prototypes of the larger one, and no score falls by more than the bound says."""

import pytest
import torch
from typer.testing import CliRunner

from transformers_rbl import RedundancyCodebook
from transformers_rbl.building.compressing import compress
from transformers_rbl.cli import app
from transformers_rbl.models.scorers import max_cosine


@pytest.fixture
def book():
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 24, generator=random)
    return RedundancyCodebook((centres[:, None] + 0.3 * torch.randn(6, 7, 24, generator=random)).flatten(0, 1))


@pytest.mark.parametrize("wanted", [{"count": 6}, {"count": 1}, {"max_change": 0.4}, {"max_change": 0.05}])
def test_no_score_rises_and_none_falls_by_more_than_the_bound(book, wanted):
    smaller = compress(book, **wanted)
    assert torch.equal(smaller.codebook.prototypes, book.prototypes[smaller.rows])
    assert smaller.rows.tolist() == sorted(set(smaller.rows.tolist()))
    tokens = torch.cat([torch.randn(500, 24, generator=torch.Generator().manual_seed(1)), book.prototypes])
    fall = max_cosine(tokens, book.unit_prototypes) - max_cosine(tokens, smaller.codebook.unit_prototypes)
    assert fall.min() >= -1e-6 and fall.max() <= smaller.bound + 1e-6
    assert len(smaller.rows) == wanted.get("count", len(smaller.rows))
    assert smaller.bound <= wanted.get("max_change", 2)
    assert smaller.codebook.built_with["compressed"] == {"from": 42, "bound": round(smaller.bound, 6)}


def test_as_few_stay_as_the_bound_takes(book):
    """One of each group of near-alike prototypes, and all of them where nothing may change."""
    assert len(compress(book, max_change=1.0).rows) == 6
    assert len(compress(book, max_change=0.0).rows) == 42
    twice = RedundancyCodebook(book.prototypes.repeat(2, 1))
    assert len(compress(twice, max_change=0.0).rows) == 42, "equal prototypes are one"
    assert len(compress(twice, count=60).rows) == 42, "more centres than distinct prototypes add nothing"


def test_what_stays_keeps_what_is_known_of_it(book):
    known = RedundancyCodebook(
        book.prototypes,
        base_model="a/b",
        recommended_keep_ratio=0.2,
        built_with={"source": {"image_ids": list(range(42))}},
    )
    smaller = compress(known, count=5)
    assert smaller.codebook.built_with["source"]["image_ids"] == smaller.rows.tolist()
    assert smaller.codebook.base_model == "a/b" and smaller.codebook.recommended_keep_ratio == 0.2
    assert known.built_with == {"source": {"image_ids": list(range(42))}}


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({}, "exactly one"),
        ({"count": 3, "max_change": 0.1}, "exactly one"),
        ({"count": 0}, "from 1 to"),
        ({"count": 43}, "42 prototypes"),
        ({"max_change": -0.1}, "at least 0"),
    ],
)
def test_what_is_not_understood_is_refused(book, wanted, words):
    with pytest.raises(ValueError, match=words):
        compress(book, **wanted)


def test_the_command_writes_a_codebook_and_says_what_it_costs(book, tmp_path):
    book.save_pretrained(tmp_path / "book")

    def run(*words):
        return CliRunner().invoke(app, ["compress", str(tmp_path / "book"), str(tmp_path / "small"), *map(str, words)])

    for words, sentence in ((("--count", 50), "from 1 to the codebook's 42"), ((), "Give exactly one of")):
        refused = run(*words)
        assert refused.exit_code == 2 and sentence in refused.output + refused.stderr
    result, wanted = run("--count", 6), compress(book, count=6)
    assert result.exit_code == 0, result.output
    assert "6 of 42" in result.output and f"{wanted.bound:.4f}" in result.output
    written = RedundancyCodebook.from_pretrained(tmp_path / "small")
    assert torch.equal(written.prototypes, wanted.codebook.prototypes)
    assert run("--count", 5).exit_code == 2, "what is there stays"
    assert run("--count", 5, "--overwrite").exit_code == 0
