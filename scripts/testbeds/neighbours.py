"""Initial values of a vision tower that is trained from scratch on few pictures."""

from __future__ import annotations

import math

import torch
from transformers import PretrainedConfig


STRAIGHT, DIAGONAL = [(0, 1), (0, -1), (1, 0), (-1, 0)], [(1, 1), (1, -1), (-1, 1), (-1, -1)]


@torch.no_grad()
def turn_to_neighbours(tower: torch.nn.Module, scale: float = 5.0) -> None:
    """The same for a tower with rotary positions (Qwen3-VL's): biases of queries and keys whose product is largest for
    the neighbour, and learned positions as waves over the image."""
    side, frequencies = tower.num_grid_per_side, tower.rotary_pos_emb.inv_freq
    half, count = 2 * len(frequencies), 3  # slower ones do not tell neighbours apart
    for block, offsets in zip(tower.blocks, (STRAIGHT, DIAGONAL, STRAIGHT)):
        queries, keys, _ = block.attn.qkv.bias.view(3, -1, 2 * half)  # first halves turn into second halves
        for head, offset in enumerate(offsets):
            for axis, delta in enumerate(offset):
                part, angles = slice(axis * half // 2, axis * half // 2 + count), delta * frequencies[:count]
                keys[head, :half][part] += scale
                queries[head, :half][part] += scale * angles.cos()
                queries[head, half:][part] += scale * angles.sin()
    place = torch.arange(side) / side
    waves = torch.cat([f(math.pi * k * place)[:, None] for k in (1, 2, 4) for f in (torch.cos, torch.sin)], 1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    tower.pos_embed.weight[:, : 2 * waves.shape[1]] = 0.7 * torch.cat([rows, columns], -1).flatten(0, 1)


@torch.no_grad()
def look_at_neighbours(tower: torch.nn.Module, config: PretrainedConfig, scale: float = 2.0) -> None:
    """Positions as sines and cosines of row and column, and in the first three layers heads that look at the
    neighbouring patches. A tower this small learns digits from few pictures only with such a start."""
    side, width = config.image_size // config.patch_size, config.hidden_size // config.num_attention_heads
    tower = getattr(tower, "vision_model", tower)
    periods = torch.tensor([24.0, 12, 8, 6, 4, 3])[: width // 4]
    frequencies, count = 2 * math.pi / periods, len(periods)
    y, x = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    waves = [torch.stack([(v[..., None] * frequencies).cos(), (v[..., None] * frequencies).sin()], -1) for v in (y, x)]
    table = torch.cat([wave.flatten(-2) for wave in waves], -1).flatten(0, 1)
    size = table.shape[1]
    if config.model_type.startswith("siglip"):  # its own initial values drown these: CLIP's scale instead
        tower.embeddings.position_embedding.weight.normal_(std=0.02)
        for layer in tower.encoder.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight.normal_(std=0.036)
    tower.embeddings.position_embedding.weight[-(side**2) :, :size] = 0.7 * table
    for layer, offsets in zip(tower.encoder.layers, (STRAIGHT, DIAGONAL, STRAIGHT)):
        for head, offset in enumerate(offsets):
            turn = torch.zeros(size, size)
            for axis, delta in enumerate(offset):
                for k, frequency in enumerate(frequencies.tolist()):
                    at, angle = 2 * (axis * count + k), -delta * frequency
                    turn[at : at + 2, at : at + 2] = torch.tensor(
                        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
                    )
            part = slice(head * width, head * width + min(width, size))
            layer.self_attn.q_proj.weight[part, :size] += scale * torch.eye(size)[:width]
            layer.self_attn.k_proj.weight[part, :size] += scale * turn[:width]
