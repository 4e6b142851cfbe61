"""The language and the sizes of the models that read digits: a tokenizer of whole words, and stock configs."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

import tiny_checkpoint
from transformers_rbl.building.recipe import PROMPT

from .questions import draw_example
from .sizes import GRIDS, MERGED, PATCH, TILE


# Qwen's special tokens, in the places of LLaVA's: padding first, the end of an answer third.
QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
]
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stock_model(family: str) -> PreTrainedModel:
    """The stock class with the family's config and random weights."""
    kind = Qwen3VLForConditionalGeneration if family == "qwen3_vl" else tiny_checkpoint.FAMILIES[family]
    return kind(stock_config(family))


def stock_processor(config: PretrainedConfig) -> ProcessorMixin:
    """The family's own processor, with words for tokens."""
    family = config.model_type
    if family != "qwen3_vl":
        return tiny_checkpoint.processor(config, word_tokenizer(family))
    from transformers import Qwen3VLVideoProcessor  # needs torchvision

    vision = config.vision_config
    images = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        # Every image of whole visual tokens keeps its size.
        size={"shortest_edge": TILE[family] ** 2, "longest_edge": 256 * TILE[family] ** 2},
    )
    videos = Qwen3VLVideoProcessor(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size)
    return Qwen3VLProcessor(images, word_tokenizer(family), videos, chat_template=QWEN_TEMPLATE)


def stock_config(family: str) -> PretrainedConfig:
    """The stock config: a vision tower of 96 dimensions and a language model of 128."""
    return qwen_config() if family == "qwen3_vl" else llava_config(family)


def qwen_config() -> Qwen3VLConfig:
    """Three layers of each; the outputs of the tower's first two go into those of the language model's first two."""
    ids = {name: index for index, name in enumerate(QWEN_SPECIALS)}
    vision = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGED,
        "temporal_patch_size": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 16**2,
        "deepstack_visual_indexes": [0, 1],
        # Images are small: with the usual 10000, most frequencies would not turn at all.
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    }
    text = {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": len(vocabulary("qwen3_vl")),
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "pad_token_id": ids["<|endoftext|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    return Qwen3VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def llava_config(family: str) -> PretrainedConfig:
    cfg = tiny_checkpoint.config(
        family, image_size=TILE[family], patch_size=PATCH, vision_width=96, vision_layers=4, width=128, layers=3
    )
    cfg.text_config.vocab_size, cfg.text_config.initializer_range = len(vocabulary(family)), 0.02
    cfg.text_config.intermediate_size, cfg.text_config.num_key_value_heads = 320, 4
    cfg.vision_config.intermediate_size, cfg.vision_config.hidden_act = 384, "gelu"
    if family != "llava_onevision":
        cfg.vision_config.initializer_factor = 1.0
    if family == "llava_next":
        side = TILE[family]
        grids = sorted({*GRIDS[family], (1, 1), (1, 2), (2, 2)})
        cfg.image_grid_pinpoints = [[rows * side, columns * side] for rows, columns in grids]
    return cfg


def word_tokenizer(family: str = "llava") -> PreTrainedTokenizerFast:
    """One token a word, in lower case; words that it does not know become `<unk>`."""
    words = {word: index for index, word in enumerate(vocabulary(family))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    common = {"unk_token": "<unk>", "padding_side": "left", "model_max_length": 8192}
    if family == "qwen3_vl":
        specials = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "additional_special_tokens": QWEN_SPECIALS}
    else:
        specials = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
        specials["additional_special_tokens"] = tiny_checkpoint.SPECIALS[3:]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **specials, **common)


def vocabulary(family: str = "llava") -> list[str]:
    """Every token of the testbed's language: words of its questions and answers, and of the probing question."""
    words = set("user assistant system : ? . , yes no image images video none one a photo word frame".split())
    words |= {str(digit) for digit in range(10)}
    random = np.random.default_rng(0)
    for kind in ("image", "images", "video"):
        drawn = draw_example(random, kind, "train", (168, 168))
        for _, question, answer in drawn.questions + drawn.lessons:
            words |= set(split_words(question)) | set(split_words(answer))
    words |= set(split_words(PROMPT))
    return [*(QWEN_SPECIALS if family == "qwen3_vl" else tiny_checkpoint.SPECIALS), "<unk>", *sorted(words)]


def split_words(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.lower())]
