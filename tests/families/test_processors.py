"""Prompts as a family's own processor writes them, with a tokenizer of words made here: placeholders, marks, tiles.

What the cases in `tiny.py` build by hand is held against the processors that transformers ships.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from transformers_rbl import PruningConfig

from .conftest import ALL, RATIO, Kit, generated, same
from .tiny import BREAK, END, FIRST_WORD, IMAGE, PINPOINTS, START, VIDEO, VOCABULARY


@dataclass(frozen=True)
class Desk:
    """A family's processor at the size of its case.

    Args:
        make (`Callable`): `(tokenizer) -> processor`.
        specials (`dict[int, str]`): tokens of their own, by id.
        named (`dict[str, str]`): attributes of the tokenizer.
        part (`str`): what stands for an image in a text.
        units (`tuple[int, int]`): budgets of a wide photo and of a square one.
        whole (`dict`): the settings by which an image comes in one piece.
    """

    make: Callable[[PreTrainedTokenizerFast], Any]
    specials: dict[int, str]
    part: str
    units: tuple[int, int] = (1, 1)
    named: dict[str, str] = field(default_factory=dict)
    whole: dict[str, Any] = field(default_factory=dict)


def _images(name: str, **settings: Any) -> Any:
    """The image processor that needs no torchvision, where there are two."""
    made = getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")
    return made(**settings)


def _tokenizer(desk: Desk) -> PreTrainedTokenizerFast:
    known = {0: "<pad>", 1: "<s>", 2: "</s>", 10: "<unk>", **desk.specials}
    vocabulary = {known.get(number, f"w{number}"): number for number in range(VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        padding_side="left", additional_special_tokens=list(desk.specials.values()),
        **({"extra_special_tokens": desk.named} if desk.named else {}),
    )  # fmt: skip


SQUARE = {"height": 56, "width": 56}
AYA = {3: "<|IMG_PATCH|>", 5: "<|START_OF_IMG|>", 6: "<|END_OF_IMG|>", 7: "<|IMG_LINE_BREAK|>", 11: "<image>",
       12: "TILE_1", 13: "TILE_2", 14: "TILE_GLOBAL"}  # fmt: skip
SMOL = {3: "<image>", 4: "<video>", 5: "<fake_token_around_image>", 6: "<global-img>", 7: "<end_of_utterance>",
        12: "<row_1_col_1>", 13: "<row_1_col_2>"}  # fmt: skip
CROPPED = {"crop_to_patches": False}

DESKS: dict[str, Desk] = {
    "internvl": Desk(
        lambda tokenizer: transformers.InternVLProcessor(
            _images("GotOcr2", size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4), tokenizer,
            transformers.InternVLVideoProcessor(), image_seq_length=16,
        ),
        {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", START: "<img>", END: "</img>"}, "<IMG_CONTEXT>",
        named={"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
               "video_token": "<video>"}, whole=CROPPED,
    ),
    "cohere2_vision": Desk(
        lambda tokenizer: transformers.Cohere2VisionProcessor(
            transformers.Cohere2VisionImageProcessor(
                size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4, patch_size=4, downsample_factor=2
            ), tokenizer,
        ),
        {IMAGE: "<|IMG_PATCH|>", START: "<|START_OF_IMG|>", END: "<|END_OF_IMG|>", BREAK: "<|IMG_LINE_BREAK|>"},
        "<|IMG_PATCH|>", whole=CROPPED,
        named={"image_token": "<|IMG_PATCH|>", "boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>",
               "img_line_break_token": "<|IMG_LINE_BREAK|>"},
    ),
    "ovis2": Desk(
        lambda tokenizer: transformers.Ovis2Processor(
            _images("Ovis2", size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4), tokenizer,
            image_seq_length=16,
        ),
        {IMAGE: "<IMG_ATOM>", START: "<IMG_START>", END: "<IMG_END>", BREAK: "<IMG_COL>", 8: "<IMG_ROW>",
         9: "<IMG_GRID>", 11: "<image>"},
        "<image>", whole=CROPPED,
    ),
    "aya_vision": Desk(
        lambda tokenizer: transformers.AyaVisionProcessor(
            _images("GotOcr2", size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=2), tokenizer,
            patch_size=7, img_size=56, downsample_factor=2,
        ),
        AYA, "<image>", (3, 1),
    ),
    "smolvlm": Desk(
        lambda tokenizer: transformers.SmolVLMProcessor(
            _images("SmolVLM", size={"longest_edge": 112}, max_image_size={"longest_edge": 56}), tokenizer,
            transformers.SmolVLMVideoProcessor(), image_seq_len=16,
        ),
        SMOL, "<image>", (3, 5),
    ),
    "idefics3": Desk(
        lambda tokenizer: transformers.Idefics3Processor(
            _images("Idefics3", size={"longest_edge": 112}, max_image_size={"longest_edge": 56}), tokenizer,
            image_seq_len=16,
        ),
        SMOL, "<image>", (3, 5),
    ),
    "paligemma": Desk(
        lambda tokenizer: transformers.PaliGemmaProcessor(
            _images("Siglip", size=SQUARE, image_seq_length=64), tokenizer
        ),
        {IMAGE: "<image>"}, "<image>", named={"image_token": "<image>"},
    ),
    "llava_next_video": Desk(
        lambda tokenizer: transformers.LlavaNextVideoProcessor(
            transformers.LlavaNextVideoVideoProcessor(),
            _images("LlavaNext", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28},
                    image_grid_pinpoints=PINPOINTS),
            tokenizer, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        ),
        {IMAGE: "<image>", VIDEO: "<video>"}, "<image>",
    ),
    "glm4v": Desk(
        lambda tokenizer: transformers.Glm4vProcessor(
            _images("Glm4v", patch_size=7, size={"shortest_edge": 784, "longest_edge": 4704}), tokenizer,
            transformers.Glm4vVideoProcessor(patch_size=7),
        ),
        {IMAGE: "<|image|>", VIDEO: "<|video|>", START: "<|begin_of_image|>", END: "<|end_of_image|>"},
        "<|begin_of_image|><|image|><|end_of_image|>",
    ),
    "mistral3": Desk(
        lambda tokenizer: transformers.PixtralProcessor(
            _images("Pixtral", patch_size=14, size={"longest_edge": 84}), tokenizer, patch_size=7, spatial_merge_size=2
        ),
        {IMAGE: "[IMG]", END: "[IMG_END]", BREAK: "[IMG_BREAK]"}, "[IMG]",
    ),
    "perception_lm": Desk(
        lambda tokenizer: transformers.PerceptionLMProcessor(
            transformers.PerceptionLMVideoProcessor(),
            transformers.PerceptionLMImageProcessor(tile_size=28, max_num_tiles=2),
            tokenizer, patch_size=7, pooling_ratio=2,
        ),
        {IMAGE: "<|image|>", VIDEO: "<|video|>"}, "<|image|>",
        named={"image_token": "<|image|>", "video_token": "<|video|>"}, whole={"vision_input_type": "vanilla"},
    ),
}  # fmt: skip


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.RandomState(width).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


WIDE, FLAT = photo(112, 56), photo(57, 56)


@dataclass
class Prompts:
    kit: Kit
    desk: Desk
    processor: Any

    @property
    def two(self) -> list[Any]:
        """A second prompt; the tensor of Perception LM's processor has room for as many tiles an image."""
        return ["w22", WIDE if self.kit.name == "perception_lm" else FLAT, "w31 w33"]

    def __call__(self, *prompts: list[Any], **settings: Any) -> dict[str, torch.Tensor]:
        """Prompts of words and photos, as the processor gives them."""
        texts = [
            "".join(self.desk.part if isinstance(item, Image.Image) else f" {item} " for item in p) for p in prompts
        ]
        photos = [[item for item in prompt if isinstance(item, Image.Image)] for prompt in prompts]
        inputs = self.processor(
            images=photos if any(photos) else None, text=texts, return_tensors="pt", padding=True, **settings
        )
        return dict(inputs)


@pytest.fixture(
    params=[pytest.param(n, marks=() if n in ("internvl", "mistral3") else pytest.mark.slow) for n in DESKS]
)
def prompts(request: pytest.FixtureRequest, kits: Callable[[str], Kit]) -> Prompts:
    if request.param == "smolvlm":
        pytest.importorskip("num2words")
    kit, desk = kits(request.param), DESKS[request.param]
    tokenizer = _tokenizer(desk)
    return Prompts(kit, desk, desk.make(tokenizer))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


ONE = ["w20 w21", WIDE, "w30"]


def test_budgets_are_those_of_images(prompts: Prompts):
    """As many masks as images, or as tiles where the table says so; the prompt that the model sees fits them."""
    kit = prompts.kit
    for prompt, units in zip((ONE, prompts.two), prompts.desk.units):
        inputs = prompts(prompt)
        output = kit.model(**inputs)
        assert len(output.keep_masks) == units
        visual = int((inputs["input_ids"] == IMAGE).sum())
        assert sum(map(len, output.keep_masks)) == visual
        dropped = sum(int((~mask).sum()) for mask in output.keep_masks)
        assert dropped > 0 and int(output.prompt_mask.sum()) == inputs["input_ids"].shape[1] - dropped


def test_answers_are_stocks_and_those_of_single_prompts(prompts: Prompts):
    kit = prompts.kit
    both = prompts(ONE, prompts.two)
    assert same(generated(kit.model, both, pruning=ALL), generated(kit.stock, both))
    single = [answer for prompt in (ONE, prompts.two) for answer in generated(kit.model, prompts(prompt))]
    assert same(generated(kit.model, both), single)


def test_the_thumbnail_is_the_photo_in_one_piece(prompts: Prompts):
    """`tiles="base"` sees what the processor gives without tiles, also of images that stand side by side."""
    kit, whole = prompts.kit, prompts.desk.whole
    if not whole:
        pytest.skip("Its images have no tiles, no thumbnail that can be told, or row ends (LLaVA-NeXT).")
    settings, prompt = PruningConfig(keep_ratio=RATIO, tiles="base"), [WIDE, WIDE, "w30"]
    if kit.name != "perception_lm":  # whose images have as many tiles each
        prompt = [WIDE, FLAT, *prompt]
    base = kit.model(**prompts(prompt), pruning=settings).keep_masks
    alone = kit.model(**prompts(prompt, **whole), pruning=PruningConfig(keep_ratio=RATIO)).keep_masks
    assert len(base) == len(alone) == sum(isinstance(item, Image.Image) for item in prompt)
    assert any(len(mask) > len(expected) for mask, expected in zip(base, alone))
    for mask, expected in zip(base, alone):
        first = 0 if kit.name in ("ovis2", "perception_lm") else len(mask) - len(expected)
        assert torch.equal(mask[first : first + len(expected)], expected) and mask.sum() == expected.sum()


def test_words_are_words(prompts: Prompts):
    """The tokenizer made here knows every mark that the processor writes."""
    ids = prompts(ONE)["input_ids"][0].tolist()
    assert 10 not in ids or prompts.kit.name in ("smolvlm", "idefics3"), prompts.processor.tokenizer.decode(ids)
    assert [token for token in ids if token >= FIRST_WORD] == [20, 21, 30]
