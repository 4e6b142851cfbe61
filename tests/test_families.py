"""What is special to a family: towers and feature layers of LLaVA-1.5, large grids and several images of OneVision,
shapes of native resolution."""

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

import tiny_checkpoint
from conftest import GREEDY, TEXTS, encoded, make_family, visual
from transformers_rbl import LlavaForConditionalGenerationRBL, PruningConfig, RedundancyCodebook, kept_token_count
from transformers_rbl.models.families import FAMILIES
from transformers_rbl.models.layout import BASE, NEWLINE


ALL = PruningConfig(keep_ratio=1.0)
TOWERS = {
    "clip, default": {"tower": "clip"},
    "clip, full": {"tower": "clip", "vision_feature_select_strategy": "full"},
    "siglip, full": {"tower": "siglip"},
    "siglip, default": {"tower": "siglip", "vision_feature_select_strategy": "default"},
    "two layers": {"tower": "clip", "vision_feature_layer": [-2, -1]},
}


@pytest.mark.parametrize("tower", TOWERS)
def test_towers_of_llava(tmp_path, tower):
    family = make_family("llava", tmp_path, **TOWERS[tower])
    if tower == "siglip, default":  # the processor's arithmetic for a first patch that is left out
        family.processor.num_additional_image_tokens = 0
    stock, model = family.stock(), family.pruned()
    batch = family.inputs(TEXTS, family.images(4))
    assert torch.equal(model.generate(**batch, **GREEDY, pruning=ALL), stock.generate(**batch, **GREEDY))
    output = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    length = {"clip, full": 17, "siglip, default": 15}.get(tower, 16)
    assert [len(mask) for mask in output.keep_masks] == [length] * 4
    assert all(mask.sum() == kept_token_count(length, 0.3) for mask in output.keep_masks)
    assert [len(kinds) for kinds in model.model.token_kinds(**batch)] == [length] * 4
    first = model.generate(**family.inputs(TEXTS[:1]), **GREEDY, eos_token_id=None, return_dict_in_generate=True)
    question = family.inputs(["USER: <image>\nand this? ASSISTANT:"], family.images(2)[1:])
    ids = torch.cat([first.sequences, question.input_ids], dim=1)
    both = {"pixel_values": torch.cat([family.inputs(TEXTS[:1]).pixel_values, question.pixel_values])}
    cached = model.generate(input_ids=ids, past_key_values=first.past_key_values, **both, **GREEDY)
    assert torch.equal(cached, model.generate(input_ids=ids, **both, **GREEDY))
    if "cls" in tower or "clip" in tower:
        similar = model(**batch, pruning=PruningConfig(keep_ratio=0.3, score="cls_similarity_high"))
        assert all(mask.sum() == kept_token_count(length, 0.3) for mask in similar.keep_masks)
        assert tower != "clip, full" or all(mask[0] for mask in similar.keep_masks)  # [cls] is most like itself


def test_pixtral_images_of_any_size():
    """Its tower takes one image of each size; row ends are text tokens, so every visual token is a patch."""
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=261,
        pad_token_id=0,
        initializer_range=0.15,
    )
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=7
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tiny_checkpoint.IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    stock = LlavaForConditionalGeneration(config).eval()
    config = LlavaForConditionalGenerationRBL.config_class.from_dict({**config.to_dict(), "model_type": "llava_rbl"})
    model = LlavaForConditionalGenerationRBL(config).eval()
    model.load_state_dict(stock.state_dict())
    model.set_codebook(RedundancyCodebook(torch.randn(5, 32)))
    sizes, pixels = torch.tensor([[28, 56], [42, 21]]), torch.randn(2, 3, 56, 56)
    ids = torch.tensor([[1, *[3] * 8, 50, *[3] * 4, 50, *[3] * 4, 51, *[3] * 18, 60, 61]])  # 4 x 8 and 6 x 3 patches
    ids = torch.cat(
        [ids[:, :1], torch.full((1, 32), 3), torch.full((1, 1), 50), torch.full((1, 18), 3), ids[:, -2:]], 1
    )
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "image_sizes": sizes}
    assert torch.equal(model.generate(**inputs, **GREEDY, pruning=ALL), stock.generate(**inputs, **GREEDY))
    output = model.generate(**inputs, **GREEDY, pruning=PruningConfig(keep_ratio=0.25), return_dict_in_generate=True)
    assert [len(mask) for mask in output.keep_masks] == [32, 18]
    assert [int(mask.sum()) for mask in output.keep_masks] == [8, 4]
    with pytest.raises(ValueError, match=r"\[cls\] token.*pixtral"):
        model(**inputs, pruning=PruningConfig(keep_ratio=0.25, score="cls_similarity_low"))


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    return make_family("llava_onevision", tmp_path_factory.mktemp("onevision"))


def test_large_grids_are_down_sampled_as_stock_does(tmp_path):
    """The real limit of nine tiles, on a grid of sixteen."""
    grids = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    family = make_family("llava_onevision", tmp_path, image_grid_pinpoints=grids, vision_aspect_ratio="anyres_max_9")
    images = [image.resize((112, 108)) for image in family.images(1)]
    inputs = family.inputs(["<s> <image> what?"], images)
    stock, model = family.stock(), family.pruned()
    kinds = model.model.token_kinds(**inputs)[0]
    assert (
        model.model.family.tiles(model.model, inputs) == [17]
        and len(kinds) == (inputs.input_ids == tiny_checkpoint.IMAGE).sum() < 17 * 16
    )
    assert (kinds == BASE).sum() == 16 and (kinds == NEWLINE).sum() == 12  # sixteen rows of patches become twelve
    assert torch.equal(model.generate(**inputs, **GREEDY, pruning=ALL), stock.generate(**inputs, **GREEDY))
    for settings in (PruningConfig(keep_ratio=0.1), PruningConfig(keep_ratio=0.1, tiles="base", newlines="last")):
        mask = model(**inputs, pruning=settings).keep_masks[0]
        scored = int((kinds == BASE).sum() if settings.tiles == "base" else (kinds != NEWLINE).sum())
        assert mask[kinds != NEWLINE].sum() == kept_token_count(scored, 0.1)
        assert mask[kinds == NEWLINE].sum() == (1 if settings.newlines == "last" else 12)


def test_a_smaller_limit_given_by_the_caller_is_followed(onevision):
    """Stock `forward` does not hand `vision_aspect_ratio` on; the placeholders decide what is right."""
    processor = onevision.processor
    processor.vision_aspect_ratio = "anyres_max_1"
    inputs = onevision.inputs(["<s> <image> what?"], onevision.images(2)[1:])
    processor.vision_aspect_ratio = "anyres_max_2"
    model = onevision.pruned()
    with pytest.raises(ValueError, match="placeholders, but"):
        model(**inputs)
    assert model(**inputs, vision_aspect_ratio="anyres_max_1").logits.isfinite().all()


def test_images_of_one_prompt_have_no_tiles_and_keep_their_row_end(onevision):
    model = onevision.pruned()
    inputs = onevision.inputs([TEXTS[2], TEXTS[0]], onevision.images(3))
    assert inputs.batch_num_images.tolist() == [2, 1] and model.model.family.tiles(model.model, inputs)[:2] == [1, 1]
    for tiles in ("all", "base"):
        output = model(**inputs, pruning=PruningConfig(keep_ratio=0.25, tiles=tiles))
        assert [int(mask.sum()) for mask in output.keep_masks[:2]] == [4 + 1, 4 + 1]
        assert all(mask[-1] for mask in output.keep_masks[:2])
        whole = model.model.get_image_features(**visual(inputs), pruning=ALL).pooler_output
        torch.testing.assert_close(encoded(output)[:5], whole[0][output.keep_masks[0]], atol=1e-5, rtol=0)


def test_images_beyond_the_cache_keep_their_layout(onevision):
    """A prompt of two images has no tiles, even if only the second is new to the cache."""
    model = onevision.pruned()
    inputs = onevision.inputs(["<s>USER: see <image> and <image>, then choose. ASSISTANT:"], onevision.images(2))
    ids = inputs.input_ids
    second = int((ids[0] == tiny_checkpoint.IMAGE).nonzero()[17])
    parts = {"pixel_values": inputs.pixel_values[:1], "image_sizes": inputs.image_sizes[:1]}
    parts["batch_num_images"] = torch.tensor([2])  # one image, no tiles
    prefix = model(input_ids=ids[:, :second], **parts, use_cache=True)
    cached = model.generate(
        input_ids=ids, past_key_values=prefix.past_key_values, **visual(inputs), **GREEDY, return_dict_in_generate=True
    )
    assert torch.equal(cached.sequences, model.generate(**inputs, **GREEDY)) and len(cached.keep_masks) == 1


def test_new_images_that_stock_cannot_tell_apart_raise(onevision):
    call = dict(visual(onevision.inputs([TEXTS[2], TEXTS[0]], onevision.images(3))))
    model = onevision.pruned().model
    with pytest.raises(ValueError, match="one by one"):
        model.family.select(model, "image", call, [1, 2])
    selected = model.family.select(model, "image", call, [0, 1])
    assert selected["batch_num_images"] == [2] and len(selected["pixel_values"]) == 2


@pytest.mark.parametrize(
    ("name", "config", "arguments"),
    [
        ("lfm2_vl", {"downsample_factor": 2}, {"spatial_shapes": torch.tensor([[4, 6], [8, 2]])}),
        (
            "kimi_k25",
            {"vision_config": SimpleNamespace(merge_kernel_size=(2, 2))},
            {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 8, 2]])},
        ),
        (
            "gemma4",
            {"vision_config": SimpleNamespace(pooling_kernel_size=2)},
            {
                "image_position_ids": torch.stack(
                    [
                        torch.tensor([[x, y] for y in range(4) for x in range(6)]),
                        torch.tensor([[x, y] for y in range(8) for x in range(2)] + [[-1, -1]] * 8),
                    ]
                )
            },
        ),
    ],
)
def test_rows_and_columns_of_native_resolution(name, config, arguments):
    """Where the processor tells an image's shape, its tokens are a grid of that shape."""
    model = SimpleNamespace(config=SimpleNamespace(**config))
    layouts = FAMILIES[name].layouts(model, "image", arguments)
    assert [layout.grid for layout in layouts] == [(2, 3), (4, 1)] and [len(layout) for layout in layouts] == [6, 4]
    assert layouts[0].grids["base"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert FAMILIES[name].layouts(model, "image", {}) is None and FAMILIES[name].layouts(model, "video", {}) is None
