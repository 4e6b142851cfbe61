"""Compaction as properties: for any mix of text, visual tokens and padding, order stays, counts add up, nothing is
lost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transformers_rbl import scatter_to_prompt
from transformers_rbl.models.memory import CachedPrompt
from transformers_rbl.models.positions import compact_positions, next_position
from transformers_rbl.models.prompt import PromptPlan, PromptReading, check_placeholders


@st.composite
def prompts(draw):
    """(dropped, attention mask), both `(batch, L)`: at least one token stays in a row, padding anywhere or on one
    side."""
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    side = draw(st.sampled_from(["left", "right", "none", "anywhere"]))
    dropped, mask = torch.zeros(batch, length, dtype=torch.bool), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        dropped[row] = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        if side == "anywhere":
            mask[row] = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)))
        elif side != "none":
            padding = draw(st.integers(0, length - 1))
            mask[row, :padding] = 0
            mask[row] = mask[row].flip(0) if side == "right" else mask[row]
        keep = draw(st.integers(0, length - 1))
        mask[row, keep], dropped[row, keep] = 1, False
    return dropped, mask


@settings(max_examples=200, deadline=None)
@given(prompts())
def test_what_stays_is_in_order_and_counts_add_up(prompt):
    dropped, mask = prompt
    plan = PromptPlan(dropped, mask)
    ids = torch.arange(dropped.numel()).view(dropped.shape)
    compact = plan.take(ids, fill=-1)
    for row in range(len(ids)):
        expected = [i for i, d, m in zip(ids[row].tolist(), dropped[row], mask[row]) if m and not d]
        assert compact[row][plan.mask[row]].tolist() == expected
        assert plan.kept[row].sum() + plan.dropped[row].sum() == mask[row].sum()
    assert (compact[~plan.mask] == -1).all()
    assert compact.shape[1] == plan.kept.sum(1).max()  # as long as the longest row, no longer


@settings(max_examples=200, deadline=None)
@given(prompts())
def test_scattering_back_restores_the_original(prompt):
    dropped, mask = prompt
    plan = PromptPlan(dropped, mask)
    values = torch.randn(*dropped.shape, 3)
    side = "right" if plan.mask[:, 0].all() else "left"
    restored = scatter_to_prompt(plan.take(values), plan.kept, side)
    assert torch.equal(restored[plan.kept], values[plan.kept])
    assert (restored[~plan.kept] == 0).all()


@settings(max_examples=200, deadline=None)
@given(prompts())
def test_positions_are_consecutive(prompt):
    dropped, mask = prompt
    plan = PromptPlan(dropped, mask)
    positions = compact_positions(plan, (mask.cumsum(-1) - 1).clamp(min=0))
    for row in range(len(dropped)):
        kept = positions[row][plan.mask[row]].tolist()
        if (mask[row].diff() != 0).sum() <= 1:  # padding on one side: one sequence
            assert kept == list(range(kept[0], kept[0] + len(kept)))


def test_padding_stays_on_its_side():
    dropped = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    right = PromptPlan(dropped, torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]))
    left = PromptPlan(dropped, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    assert right.mask.tolist() == [[True, True, False, False], [True] * 4]
    assert left.mask.tolist() == [[False, False, True, True], [True] * 4]


def test_packed_sequences_close_their_own_gaps_only():
    dropped = torch.tensor([[0, 1, 0, 0, 1, 1, 0]]).bool()
    plan = PromptPlan(dropped)
    assert compact_positions(plan, torch.tensor([[0, 1, 2, 0, 1, 2, 3]])).tolist() == [[0, 1, 0, 1]]


def test_fill_previous_keeps_next_token_logits_right():
    """Shifting labels by one against filled logits gives the pairs that the compact prompt has."""
    kept = torch.tensor([[1, 1, 0, 0, 1, 1]]).bool()
    logits = torch.arange(4.0)[None, :, None]
    assert scatter_to_prompt(logits, kept, fill="previous")[0, :, 0].tolist() == [0, 1, 1, 1, 2, 3]


def test_scatter_refuses_what_it_cannot_place():
    kept = torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()
    with pytest.raises(ValueError, match="padding_side"):
        scatter_to_prompt(torch.zeros(2, 2), kept)
    with pytest.raises(ValueError, match="do not cover"):
        scatter_to_prompt(torch.zeros(2, 1), kept, "left")


def test_attention_mask_of_another_shape_raises():
    with pytest.raises(ValueError, match="attention_mask of shape"):
        PromptPlan(torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 1, 4, 4))


def test_placeholders_must_fit_the_images():
    slots = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    per_row = PromptReading(None, (3, 3), {"image": slots}).counts("image")
    assert per_row == [2, 0, 1]
    assert check_placeholders(per_row, [2, 1]) == [[0], [], [1]]
    assert check_placeholders(per_row, [1, 1, 1]) == [[0, 1], [], [2]]
    with pytest.raises(ValueError, match="3 image placeholders.*4"):
        check_placeholders(per_row, [2, 2])
    with pytest.raises(ValueError, match="middle of a"):
        check_placeholders(per_row, [1, 2])


def test_a_cache_that_was_cropped_or_belongs_elsewhere_raises():
    plan = PromptPlan(torch.tensor([[0, 1, 0, 0]]).bool())
    memory = plan.remember(torch.tensor([[5, 3, 6, 7]]), next_position(plan, None))
    assert memory.original_length(3) == 4 and memory.original_length(5) == 6
    with pytest.raises(ValueError, match="cropped"):
        memory.original_length(2)
    memory.check(1, torch.tensor([[5, 3, 6, 7, 9]]))
    with pytest.raises(ValueError, match="do not begin"):
        memory.check(1, torch.tensor([[5, 3, 6, 8, 9]]))
    with pytest.raises(ValueError, match="rows"):
        memory.check(2)
    assert memory.repeat(2).kept.tolist() == [[True, False, True, True]] * 2
    assert CachedPrompt.of(object()) is None


def test_a_second_turn_adds_to_what_is_remembered():
    first = PromptPlan(torch.tensor([[0, 1, 0, 0]]).bool())
    memory = first.remember(torch.tensor([[5, 3, 6, 7]]), next_position(first, None))
    second = PromptPlan(torch.tensor([[0, 1, 1, 0]]).bool(), start=memory.original_length(5), memory=memory)
    assert compact_positions(second, None).tolist() == [[5, 6]]  # three cached, two decoded since
    assert compact_positions(second, torch.tensor([[6, 7, 8, 9]])).tolist() == [[5, 6]]
    grown = second.remember(None, next_position(second, compact_positions(second, None)))
    assert grown.dropped.tolist() == [3] and grown.next_position.tolist() == [7]
    assert grown.kept.long().tolist() == [[1, 0, 1, 1, 1, 1, 1, 0, 0, 1]]
    assert grown.mask.all() and grown.mask.shape == (1, 7) and grown.original_length(7) == 10
