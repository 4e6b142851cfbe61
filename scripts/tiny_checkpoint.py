"""Small checkpoints of the three real architectures, with random weights: for the quickstart, tests and benchmarks.

Their answers mean nothing; every shape, layer and file is real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
)


FAMILIES = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}
SPECIALS = ["<pad>", "<s>", "</s>", "<image>", "<video>"]
PAD, BOS, EOS, IMAGE, VIDEO = range(5)
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] | upper }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'video' %}<video>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: reads and writes any text without a vocabulary file."""
    vocabulary = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        additional_special_tokens=SPECIALS[3:],
        model_max_length=8192,
    )


def config(
    family: str = "llava_next",
    tower: str | None = None,
    image_size: int = 28,
    patch_size: int = 7,
    vision_width: int = 32,
    vision_layers: int = 3,
    width: int = 32,
    layers: int = 2,
    heads: int = 4,
    **kwargs: Any,
) -> PretrainedConfig:
    """The config of a family, with its own kind of vision tower (`tower`: clip or siglip) and language model, every
    tile grid that matters, and a single tile besides."""
    text = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "vocab_size": len(SPECIALS) + 256,
        "max_position_embeddings": 8192,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "initializer_range": 0.15,
    }
    vision = {
        "hidden_size": vision_width,
        "intermediate_size": 2 * vision_width,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    common = {"image_token_index": IMAGE, "tie_word_embeddings": False}
    tower = tower or ("siglip" if family == "llava_onevision" else "clip")
    if tower == "clip":
        common["vision_config"] = CLIPVisionConfig(**vision, initializer_factor=4.0)
        common |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    else:
        common["vision_config"] = SiglipVisionConfig(**vision, vision_use_head=False)
        common |= {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    grids = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1)]
    pinpoints = [[rows * image_size, columns * image_size] for rows, columns in grids]
    sequence = (image_size // patch_size) ** 2
    if family == "llava":
        return LlavaConfig(**{**common, **kwargs}, text_config=LlamaConfig(**text), image_seq_length=sequence)
    if family == "llava_next":
        common |= {"image_grid_pinpoints": pinpoints, "image_seq_length": sequence}
        return LlavaNextConfig(**{**common, **kwargs}, text_config=LlamaConfig(**text))
    # Real checkpoints down-sample grids of more than nine tiles; these small ones, of more than two.
    common |= {"image_grid_pinpoints": pinpoints, "video_token_index": VIDEO, "vision_aspect_ratio": "anyres_max_2"}
    return LlavaOnevisionConfig(**{**common, **kwargs}, text_config=Qwen2Config(**text))


def processor(cfg: PretrainedConfig, words: PreTrainedTokenizerFast | None = None) -> ProcessorMixin:
    """The family's own processor for that config; `words` is the tokenizer, by default bytes."""
    words = words or tokenizer()
    vision, strategy = cfg.vision_config, cfg.vision_feature_select_strategy
    side, extra = vision.image_size, int(vision.model_type == "clip_vision_model")
    size = {"shortest_edge": side}
    common = {"vision_feature_select_strategy": strategy, "chat_template": CHAT_TEMPLATE}
    if cfg.model_type.startswith("llava_onevision"):
        from transformers import LlavaOnevisionVideoProcessor  # needs torchvision

        square = {"height": side, "width": side}
        images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=cfg.image_grid_pinpoints)
        return LlavaOnevisionProcessor(
            images,
            words,
            LlavaOnevisionVideoProcessor(size=square),
            **common,
            num_image_tokens=(side // vision.patch_size) ** 2 + extra,
            vision_aspect_ratio=cfg.vision_aspect_ratio,
        )
    common |= {"patch_size": vision.patch_size, "num_additional_image_tokens": extra}
    if cfg.model_type.startswith("llava_next"):
        images = LlavaNextImageProcessorPil(
            size=size, crop_size={"height": side, "width": side}, image_grid_pinpoints=cfg.image_grid_pinpoints
        )
        return LlavaNextProcessor(images, words, **common)
    images = LlavaImageProcessorPil(size=size, crop_size={"height": side, "width": side})
    return LlavaProcessor(images, words, **common)


# The quickstart's sizes: an 8 x 8 grid, wide enough to be worth timing.
QUICKSTART = {
    "image_size": 112,
    "patch_size": 14,
    "vision_width": 128,
    "vision_layers": 4,
    "width": 256,
    "layers": 6,
    "heads": 8,
}


def build(folder: str | Path, family: str = "llava_next", seed: int = 0, **sizes: Any) -> Path:
    """Write model, processor and generation config to `folder`; a finished one is used again."""
    folder = Path(folder)
    done = folder / "finished"
    if not done.exists():
        cfg = config(family, **sizes)
        torch.manual_seed(seed)
        model = FAMILIES[family](cfg).eval()
        model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
        model.save_pretrained(folder)
        processor(cfg).save_pretrained(folder)
        done.touch()
    return folder


def main(
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
    family: Annotated[str, typer.Option(help=f"One of {', '.join(FAMILIES)}.")] = "llava_next",
) -> None:
    """Write a small checkpoint with random weights, of the quickstart's sizes."""
    if family not in FAMILIES:
        raise typer.BadParameter(f"--family is one of {', '.join(FAMILIES)}, not {family}.")
    build(folder, family, **QUICKSTART)


if __name__ == "__main__":
    typer.run(main)
