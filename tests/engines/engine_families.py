"""Small random checkpoints of the size that engines on a CPU can serve: vLLM's attention there knows heads of 32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

import small_families
from conftest import CLASSES, make_family
from transformers_rbl import RedundancyCodebook, rbl_class


WIDTH = 128
LLAVA = {"width": WIDTH, "heads": 4, "vision_width": 64}
NATIVE = ("qwen2_5_vl", "qwen3_vl", "internvl")
SERVED = (*CLASSES, *NATIVE)


def engine_family(name: str, folder: Path) -> Any:
    """A family's stock checkpoint, its processor, and how its pruned model is loaded."""
    codebook = RedundancyCodebook(torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0)))
    if name in CLASSES:
        layout = {"vision_aspect_ratio": "anyres_max_9"} if name == "llava_onevision" else {}
        family = make_family(name, folder, **LLAVA, **layout)
        family.codebook = codebook
        return family
    small_families.build(folder, name)  # for its processor and the shape of its config
    widen(folder)
    return SimpleNamespace(
        name=name,
        folder=folder,
        processor=AutoProcessor.from_pretrained(folder),
        codebook=codebook,
        pruned=lambda **kwargs: rbl_class(folder).from_pretrained(folder, codebook=codebook, **kwargs).eval(),
    )


def widen(folder: Path) -> None:
    """The same model with a language model of width 128."""
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size, text.head_dim = WIDTH, 2 * WIDTH, WIDTH // text.num_attention_heads
    if hasattr(config.vision_config, "out_hidden_size"):
        config.vision_config.out_hidden_size = WIDTH
    if "mrope_section" in (text.rope_parameters or {}):
        text.rope_parameters["mrope_section"] = [6, 5, 5]
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.1)
            elif not weight.any() and "bias" not in key:
                weight.normal_(0, 0.2)
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)


def image_part(name: str) -> str:
    """What a prompt says for an image."""
    return "<image>\n" if name in CLASSES else small_families.PART[name]
