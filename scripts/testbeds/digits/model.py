"""The language and the sizes of the models that read digits: a tokenizer of whole words, and stock configs."""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

import tiny_checkpoint
from transformers_rbl.building.recipe import PROMPT

from .questions import draw_example
from .sizes import GRIDS, PATCH, TILE


def stock_config(family: str) -> PretrainedConfig:
    """The stock config: a vision tower of 96 dimensions and a language model of 128."""
    cfg = tiny_checkpoint.config(
        family, image_size=TILE[family], patch_size=PATCH, vision_width=96, vision_layers=4, width=128, layers=3
    )
    cfg.text_config.vocab_size, cfg.text_config.initializer_range = len(vocabulary()), 0.02
    cfg.text_config.intermediate_size, cfg.text_config.num_key_value_heads = 320, 4
    cfg.vision_config.intermediate_size, cfg.vision_config.hidden_act = 384, "gelu"
    if family != "llava_onevision":
        cfg.vision_config.initializer_factor = 1.0
    if family == "llava_next":
        side = TILE[family]
        grids = sorted({*GRIDS, (1, 1), (1, 2), (2, 2)})
        cfg.image_grid_pinpoints = [[rows * side, columns * side] for rows, columns in grids]
    return cfg


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, in lower case; words that it does not know become `<unk>`."""
    words = {word: index for index, word in enumerate(vocabulary())}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        additional_special_tokens=tiny_checkpoint.SPECIALS[3:],
        model_max_length=8192,
    )


def vocabulary() -> list[str]:
    """Every token of the testbed's language: words of its questions and answers, and of the probing question."""
    words = set("user assistant system : ? . , yes no image images video none one a photo word frame".split())
    words |= {str(digit) for digit in range(10)}
    random = np.random.default_rng(0)
    for kind in ("image", "images", "video"):
        drawn = draw_example(random, kind, "train", (168, 168))
        for _, question, answer in drawn.questions + drawn.lessons:
            words |= set(split_words(question)) | set(split_words(answer))
    words |= set(split_words(PROMPT))
    return [*tiny_checkpoint.SPECIALS, "<unk>", *sorted(words)]


def split_words(text: str) -> list[str]:
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.lower())]
