"""A small LLaVA-NeXT checkpoint of the real architecture, with random weights: for the quickstart, tests and
benchmarks.

Its answers mean nothing; every shape, layer and file is real.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)


PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] | upper }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: reads and writes any text without a vocabulary file."""
    specials = ["<pad>", "<s>", "</s>", "<image>"]
    vocabulary = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        additional_special_tokens=["<image>"], model_max_length=8192,
    )  # fmt: skip


def config(image_size=28, patch_size=7, vision_width=32, vision_layers=3, width=32, layers=2, heads=4, **kwargs):
    """A `LlavaNextConfig` with all the tile grids of the real one, and a single tile besides."""
    grids = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
    text = {
        "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2), "vocab_size": 260, "max_position_embeddings": 8192,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.15,
    }  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=vision_width, intermediate_size=2 * vision_width, num_hidden_layers=vision_layers,
        num_attention_heads=4, image_size=image_size, patch_size=patch_size, initializer_factor=4.0,
    )  # fmt: skip
    return LlavaNextConfig(
        vision_config=vision, text_config=LlamaConfig(**text), image_token_index=IMAGE, vision_feature_layer=-2,
        image_grid_pinpoints=[[rows * image_size, columns * image_size] for rows, columns in grids],
        image_seq_length=(image_size // patch_size) ** 2, tie_word_embeddings=False, **kwargs,
    )  # fmt: skip


def processor(cfg: LlavaNextConfig) -> LlavaNextProcessor:
    side = cfg.vision_config.image_size
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=cfg.image_grid_pinpoints,
    )
    return LlavaNextProcessor(
        images, tokenizer(), patch_size=cfg.vision_config.patch_size, vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip


def build(folder: str | Path, seed: int = 0, **sizes) -> Path:
    """Write model, processor and generation config to `folder`; a finished one is used again."""
    folder = Path(folder)
    done = folder / "finished"
    if not done.exists():
        cfg = config(**sizes)
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(cfg).eval()
        model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
        model.save_pretrained(folder)
        processor(cfg).save_pretrained(folder)
        done.touch()
    return folder
