"""Attention of a vision tower's layer, from the hidden state that the layer reads: its queries and keys once more.

The tower keeps SDPA or FlashAttention, which hand out no attention; nothing is hooked or written on it, so that calls
at the same time do not meet; and features that were encoded before can be pruned by attention too. It costs two
projections of one layer: less than one in a hundred of a tower of 24 layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


# Layers of which it is known that queries and keys are `q_proj` and `k_proj` of `layer_norm1` of what they read, and
# nothing besides (no rotation, no windows, no padding).
LAYERS = ("CLIPEncoderLayer", "SiglipEncoderLayer")


def queries_and_keys(tower: nn.Module, hidden_states: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the layer whose output is `hidden_states[layer]`.

    Args:
        tower (`nn.Module`): CLIP's or SigLIP's.
        hidden_states (`tuple[torch.Tensor, ...]`): of shape `(images, T, width)` each; the one that the layer reads is
            needed.
        layer (`int`): as `vision_feature_layer`.

    Returns:
        Two tensors of shape `(images, T, heads, head_dim)`, float32, computed in the tower's dtype.

    Raises:
        ValueError: for a tower of another kind, and if the hidden state is not there.
    """
    layers = next((module for module in tower.modules() if isinstance(module, nn.ModuleList) and _known(module)), None)
    if layers is None:
        raise ValueError(
            f"attention is read off vision towers of {' or '.join(LAYERS)}, and {type(tower).__name__} is none"
        )
    number = layer - 1 if layer >= 0 else len(layers) + layer
    if not 0 <= number < len(layers):
        raise ValueError(f"hidden state {layer} of the vision tower is no layer's output, so there is no attention")
    state = None if hidden_states is None or len(hidden_states) <= number else hidden_states[number]
    if state is None:
        raise ValueError(
            "the features were encoded without the hidden state before the selected one: pass output_hidden_states=True"
            " to get_image_features"
        )
    read: Any = layers[number]
    attention = read.self_attn
    with torch.no_grad():
        normed = read.layer_norm1(state)
        heads = (*state.shape[:2], -1, attention.head_dim)
        return attention.q_proj(normed).view(heads).float(), attention.k_proj(normed).view(heads).float()


def received_attention(queries: torch.Tensor, keys: torch.Tensor, from_cls: bool) -> torch.Tensor:
    """Attention that each token receives, from [cls] (the first token) or from all tokens on average; mean over heads.

    Args:
        queries, keys (`torch.Tensor` of shape `(images, T, heads, head_dim)`): float32.
        from_cls (`bool`): whether the first token is [cls].

    Returns:
        `torch.Tensor` of shape `(images, T)`: sums to 1 over T.
    """
    asking = queries[:, :1] if from_cls else queries
    received = []
    with torch.autocast(queries.device.type, enabled=False):  # it would turn the product to half precision
        for query, key in zip(asking, keys):  # one image at a time: without [cls] this is heads x T x T
            logits = query.transpose(0, 1) @ key.permute(1, 2, 0) * query.shape[-1] ** -0.5
            received.append(logits.softmax(dim=-1).mean(dim=(0, 1)))
    return torch.stack(received)


def _known(layers: nn.ModuleList) -> bool:
    return len(layers) > 0 and type(layers[0]).__name__ in LAYERS
