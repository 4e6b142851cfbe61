"""Features that were pruned apart from their prompt are what the prompt's own call would have made of them."""

from __future__ import annotations

import pytest
import torch

from transformers_rbl import PruningConfig
from transformers_rbl.inputs import image_arguments, image_runs, inputs_with_features

from .conftest import OFF


OWN = [None, PruningConfig(keep_ratio=0.5, newlines="row"), OFF]


@pytest.mark.parametrize("name", ["mistral3", "molmo2"])
@pytest.mark.parametrize("newlines", ["all", "row", "last"])
@torch.no_grad()
def test_marks_in_text_leave_by_the_settings_that_the_features_were_pruned_under(kits, name, newlines):
    kit = kits(name)
    model, inputs = kit.load(), kit.inputs(kit.one, kit.two, kit.text)
    settings = PruningConfig(keep_ratio=0.1, newlines=newlines)
    expected = model(**inputs, pruning=settings)
    images = image_arguments(model, inputs)
    handed = model.get_image_features(**images, pruning=settings, return_dict=True)
    whole = model.get_image_features(**images, pruning=OFF, return_dict=True)
    later = model.model.prune_image_features(whole, settings, **images)
    for model.pruning in OWN:
        for features in (handed, later):
            output = model(**inputs_with_features(model, inputs, features))
            assert torch.equal(output.prompt_mask, expected.prompt_mask)
            torch.testing.assert_close(output.logits, expected.logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["internvl", "cohere2_vision", "ovis2"])
@torch.no_grad()
def test_thumbnails_alone_stay_of_features_that_were_encoded_whole(kits, name):
    kit = kits(name)
    model, inputs, settings = kit.model, kit.inputs(kit.two), PruningConfig(keep_ratio=0.4, tiles="base")
    expected = model(**inputs, pruning=settings)
    images = image_arguments(model, inputs)
    whole = model.get_image_features(**images, pruning=OFF, return_dict=True)
    features = model.model.prune_image_features(whole, settings, [image_runs(model, inputs["input_ids"])], **images)
    assert all(map(torch.equal, features.keep_masks, expected.keep_masks))
    output = model(**inputs_with_features(model, inputs, features))
    torch.testing.assert_close(output.logits, expected.logits, atol=2e-4, rtol=0)
    with pytest.raises(ValueError, match="Only the prompt tells which tile"):
        model.model.prune_image_features(whole, settings, **images)
