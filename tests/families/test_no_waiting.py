"""Between projector and language model the host asks the device for nothing: ratios, every family, on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from transformers_rbl import PruningConfig
from transformers_rbl.models.modeling_rbl import RBLMixin

from .conftest import GREEDY, Kit
from .waits import Wait, watched


# What stock itself asks there, by function; all other families ask nothing in `forward`.
GRIDS = {"get_image_features"}  # splits its tokens by grids that it reads on the device
CHECK = {"get_placeholder_mask", "torch_compilable_check"}  # of families that read features for more than their places
STOCKS_OWN = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "glm4v", "glm46v", "kimi_k25"), GRIDS),
    **dict.fromkeys(("smolvlm", "idefics3", "mistral3", "lfm2_vl"), GRIDS),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe"), GRIDS | CHECK),
    "paddleocr_vl": GRIDS,
    **dict.fromkeys(("gemma3", "gemma3n", "fast_vlm", "perception_lm"), CHECK),
    "molmo2": {*GRIDS, *CHECK, "forward"},
    "gemma4": {*GRIDS, *CHECK, "forward", "find_packed_sequence_indices"},
    "paligemma": {*CHECK, "find_packed_sequence_indices"},
    "ovis2": {*CHECK, "forward"},
}
# Stock `generate` reads its end and padding ids, the mask and the prompt before it prefills.
GENERATE = {"_prepare_special_tokens", "generate", "_get_logits_processor"}


def called(model: Any, how: str, **inputs: Any) -> list[Wait]:
    """Waits of one call."""
    with torch.no_grad(), watched(model) as waits:
        if how == "forward":
            model(**inputs)
        else:
            model.generate(**inputs, **GREEDY | {"max_new_tokens": 1})
    return waits


@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("score", ["cosine", "random"])
def test_nothing_is_asked_of_the_device(kit: Kit, how: str, score: str):
    pruning = PruningConfig(keep_ratio=0.4, score=score)
    waits = called(kit.model, how, **kit.inputs(kit.two), pruning=pruning)
    assert [wait for wait in waits if wait.is_ours] == []
    known = STOCKS_OWN.get(kit.name, set()) | (GENERATE if how == "generate" else set())
    assert {wait.function for wait in waits} <= known


def test_prompts_of_different_length_wait_for_stock_alone(kit: Kit):
    """Ragged prompts keep a mask, and stock asks whether it hides anything."""
    waits = called(kit.model, "forward", **kit.inputs(kit.one, kit.two))
    assert [wait for wait in waits if wait.is_ours] == []


def test_a_threshold_asks_once_for_all_images(kit: Kit):
    waits = called(kit.model, "forward", **kit.inputs(kit.two), pruning=PruningConfig(threshold=0.2))
    assert [wait.function for wait in waits if wait.is_ours] == ["kept_counts"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_it_would_show(kits, name: str, monkeypatch: pytest.MonkeyPatch):
    """One `any` put back is found."""
    kit, compact = kits(name), RBLMixin._compact

    def asking(self: Any, call: Any, plan: Any) -> None:
        if plan.dropped.any():
            compact(self, call, plan)

    monkeypatch.setattr(RBLMixin, "_compact", asking)
    for how in ("forward", "generate"):
        waits = called(kit.model, how, **kit.inputs(kit.two))
        assert [wait.name for wait in waits if wait.is_ours] == ["_local_scalar_dense"]


@pytest.mark.parametrize(
    "asking",
    [
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 1).nonzero(),
        lambda x: x.index_put_((x > 0,), x.new_zeros(())),
        lambda x: bool((x > 0).any()),
        lambda x: int(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x.abs().long()),
        lambda x: torch.masked_select(x, x > 0),
    ],
)
def test_each_way_of_asking_is_seen(kits, asking: Any, monkeypatch: pytest.MonkeyPatch):
    kit, compact = kits("llava"), RBLMixin._compact

    def then(self: Any, call: Any, plan: Any) -> None:
        compact(self, call, plan)
        asking(torch.ones(3))

    monkeypatch.setattr(RBLMixin, "_compact", then)
    assert any(wait.is_ours for wait in called(kit.model, "forward", **kit.inputs(kit.one)))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_a_compiled_model_answers_the_same(kits, name: str):
    """With graph breaks: what the prompt says is read on the host."""
    kit = kits(name)
    torch._dynamo.reset()
    compiled = torch.compile(kit.model, backend="eager")
    for prompt in (kit.one, kit.two):
        inputs = kit.inputs(prompt)
        ours, expected = compiled(**inputs), kit.model(**inputs)
        torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=0)
        assert all(torch.equal(a, b) for a, b in zip(ours.keep_masks, expected.keep_masks))


@torch.no_grad()
def test_a_mask_beside_positions_of_the_user_stays(kits):
    """Stock reads positions that start again as packed sequences, but not where there is a mask."""
    kit = kits("llava")
    inputs = kit.inputs(kit.one)
    length = inputs["input_ids"].shape[1]
    inputs["position_ids"] = torch.cat([torch.arange(length - 3), torch.arange(3)])[None]
    rule = PruningConfig(keep_ratio=1.0)
    whole = kit.model(**inputs, use_cache=False, pruning=rule).logits
    torch.testing.assert_close(whole, kit.stock(**inputs, use_cache=False).logits, atol=2e-4, rtol=0)
    half = kit.model(**inputs, use_cache=False, pruning=PruningConfig(keep_ratio=0.5)).logits
    seen = kit.model(**inputs, use_cache=True, pruning=PruningConfig(keep_ratio=0.5)).logits  # never packed
    torch.testing.assert_close(half, seen, atol=2e-4, rtol=0)
