"""Small random checkpoints of families that differ in mechanism, each with its own processor and a tokenizer of bytes.

`build(folder, name)` writes model and processor, as a checkpoint from the Hub would be. What each is here for:

- qwen2_5_vl, qwen3_vl: native resolution, positions in three dimensions, deepstack;
- internvl: tiles of one image in one run of placeholders;
- gemma3: image tokens attend in both directions, sliding windows;
- mistral3: native resolution, row ends are text;
- qwen3_5: layers of linear attention.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    Mistral3Config,
    MistralConfig,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)


PAD, BOS, EOS, IMAGE, VIDEO, START, END, BREAK = range(8)
VOCABULARY = 8 + 256
WIDTH = 32
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
SPECIALS = {
    "qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "internvl": ("<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
    "gemma3": ("<image_soft_token>", "<video>", "<start_of_image>", "<end_of_image>"),
    "mistral3": ("[IMG]", "[VID]", "[S]", "[IMG_END]"),
}
SPECIALS["qwen3_vl"] = SPECIALS["qwen3_5"] = SPECIALS["qwen2_5_vl"]
# What a chat template puts for an image; the processor makes placeholders and marks of it.
PART = dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_5"), "<|vision_start|><|image_pad|><|vision_end|>") | {
    "internvl": "<IMG_CONTEXT>\n",
    "gemma3": "<start_of_image>",
    "mistral3": "[IMG]",
}
FAMILIES = tuple(PART)


def build(folder: Path, name: str, **text: Any) -> Path:
    """Write a random checkpoint of that family, and return its folder; `text` are settings of its language model."""
    torch.manual_seed(0)
    config = _config(name)
    for setting, value in text.items():
        setattr(config.get_text_config(), setting, value)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.15)
            elif not weight.any() and "bias" not in key:
                weight.normal_(0, 0.2)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(folder)
    _processor(name).save_pretrained(folder)
    return folder


def _config(name: str) -> transformers.PreTrainedConfig:
    tower = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    merged = {**tower, "out_hidden_size": WIDTH, "num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    ids = {"image_token_id": IMAGE, "tie_word_embeddings": False}
    marks = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    square = {**tower, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56, "patch_size": 7}
    if name == "qwen2_5_vl":
        vision = {**merged, "depth": 2, "patch_size": 7, "window_size": 28, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(vision_config=vision, text_config={**TEXT, "rope_parameters": rope}, **ids, **marks)
    if name in ("qwen3_vl", "qwen3_5"):
        vision = {**merged, "depth": 3, "patch_size": 8, "num_position_embeddings": 64}
        text = {**TEXT, "num_hidden_layers": 4, "head_dim": 8, "rope_parameters": {**rope, "mrope_interleaved": True}}
        if name == "qwen3_vl":
            vision["deepstack_visual_indexes"] = [0, 1]
            return Qwen3VLConfig(vision_config=vision, text_config=text, **ids, **marks)
        text["rope_parameters"]["partial_rotary_factor"] = 1.0
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 4}
        text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
        text["layer_types"] = ["linear_attention", "full_attention"] * 2
        return Qwen3_5Config(vision_config=vision, text_config=text, **ids, **marks)
    if name == "internvl":
        vision = InternVLVisionConfig(**{**square, "image_size": [56, 56], "patch_size": [7, 7]})
        return InternVLConfig(
            vision_config=vision, text_config=Qwen2Config(**TEXT), image_seq_length=16, downsample_ratio=0.5, **ids
        )
    if name == "gemma3":
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        text = Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=24, layer_types=layers, query_pre_attn_scalar=8)
        vision = {**square, "model_type": "siglip_vision_model", "vision_use_head": False}
        boundary = {"boi_token_index": START, "eoi_token_index": END, "mm_tokens_per_image": 16}
        return Gemma3Config(vision_config=vision, text_config=text, image_token_index=IMAGE, **ids, **boundary)
    vision = {**square, "model_type": "pixtral", "image_size": 140, "head_dim": 8}
    text = MistralConfig(**TEXT, head_dim=8, sliding_window=None)
    where = {"image_token_index": IMAGE, "spatial_merge_size": 2, "vision_feature_layer": -1}
    return Mistral3Config(vision_config=vision, text_config=text, **ids, **where)


def _processor(name: str) -> transformers.ProcessorMixin:
    image, video, start, end = SPECIALS[name]
    common = {"chat_template": _chat_template(name)}
    if name.startswith("qwen"):
        named = {"image_token": image, "video_token": video, "vision_bos_token": start, "vision_eos_token": end}
        patch = 7 if name == "qwen2_5_vl" else 8
        area = (2 * patch) ** 2
        size = {"shortest_edge": 4 * area, "longest_edge": 24 * area}
        # Of images as of videos, like released checkpoints: Qwen3-VL's are halves.
        halves = {} if name == "qwen2_5_vl" else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = _image_processor("Qwen2VL", patch_size=patch, merge_size=2, temporal_patch_size=2, size=size, **halves)
        if name == "qwen2_5_vl":
            return Qwen2_5_VLProcessor(images, _tokenizer(name, named), Qwen2VLVideoProcessor(patch_size=7), **common)
        return Qwen3VLProcessor(images, _tokenizer(name, named), Qwen3VLVideoProcessor(patch_size=8), **common)
    if name == "internvl":
        named = {"context_image_token": image, "start_image_token": start, "end_image_token": end, "video_token": video}
        square = {"height": 56, "width": 56}
        images = _image_processor("GotOcr2", size=square, crop_to_patches=True, min_patches=1, max_patches=4)
        return InternVLProcessor(
            images, _tokenizer(name, named), InternVLVideoProcessor(), image_seq_length=16, **common
        )
    if name == "gemma3":
        named = {"image_token": image, "boi_token": start, "eoi_token": end}
        images = _image_processor("Gemma3", size={"height": 56, "width": 56})
        return Gemma3Processor(images, _tokenizer(name, named), image_seq_length=16, **common)
    images = _image_processor("Pixtral", patch_size=14, size={"longest_edge": 84})
    return PixtralProcessor(images, _tokenizer(name, {}), patch_size=7, spatial_merge_size=2, **common)


def _image_processor(name: str, **settings):
    """The one that needs no torchvision, where there are two."""
    made_by = getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")
    return made_by(**settings)


def _tokenizer(name: str, named: dict[str, str]) -> PreTrainedTokenizerFast:
    specials = [*SPECIALS[name], "[IMG_BREAK]"]
    tokens = ["<pad>", "<s>", "</s>", *specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        additional_special_tokens=specials,
        model_max_length=8192,
        **({"extra_special_tokens": named} if named else {}),
    )


def _chat_template(name: str) -> str:
    return (
        "<s>{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + PART[name] + "{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
        "{% endfor %}{% if add_generation_prompt %}answer:{% endif %}"
    )


def photos(count: int = 3) -> list:
    """Wide, high and square noise."""
    import numpy as np
    from PIL import Image

    random, sizes = np.random.RandomState(0), [(60, 90), (110, 56), (57, 56)]
    return [Image.fromarray(random.randint(0, 255, (*sizes[i % 3], 3), dtype=np.uint8)) for i in range(count)]


def family(folder: Path, name: str, **text: Any) -> SimpleNamespace:
    """What tests of the commands take: `name`, `folder`, `processor`, and functions that load it stock and pruned."""
    from transformers import AutoProcessor

    from transformers_rbl import RedundancyCodebook, rbl_class

    build(folder, name, **text)
    codebook = RedundancyCodebook(torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0)))
    return SimpleNamespace(
        name=name,
        folder=folder,
        processor=AutoProcessor.from_pretrained(folder),
        codebook=codebook,
        stock=lambda **kwargs: AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval(),
        pruned=lambda **kwargs: rbl_class(folder).from_pretrained(folder, codebook=codebook, **kwargs).eval(),
    )
