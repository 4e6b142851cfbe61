"""Rules that others published, from their papers, in our code.

Given the same attention, keys and relevance, they choose what the authors' code chooses: of 576 random tokens, 64, 128
and 192 kept, five draws each, for SCOPE, CDPruner, VisionZip (and what it merges, but for its length) and VisPruner
(14 of 15 draws; in the other the authors' code in float32 and in float64 part as well). The others were not run so.

What holds for all of them: tokens are chosen among all scored tokens of an image at once (the authors do so per tile),
and their number is the keep ratio's. Where authors compare features of the vision tower, the visual tokens themselves
are compared, behind the projector; where they sum features in front of the projector, tokens are averaged behind it by
the same shares, since a sum would have the length of several tokens. [cls] itself is no visual token and never stays.
"""

from __future__ import annotations

import torch

from .greedy import cosine_matrix, greedy_coverage, greedy_dpp, over_images
from .merging import Choice, averages, places


def attended(cls_attention: torch.Tensor) -> torch.Tensor:
    """Keeps the patches that [cls] attends to most: FasterVLM (arXiv 2412.01818v1, section 3.2), and the dominant ones
    of VisionZip. Attention of the layer whose output the projector reads; without a [cls], that from all patches.

    Args:
        cls_attention (`torch.Tensor` of shape `(L,)`): mean over heads.
    """
    return -cls_attention


def visionzip(cls_attention: torch.Tensor, tower_keys: torch.Tensor, count: int) -> Choice:
    """VisionZip (arXiv 2412.04467, section 3.2): the most attended tokens stay as they are; of the others evenly spaced
    ones stay as well, and each takes in those whose keys are most like its own: the mean of itself and of their mean.

    10 of 64 tokens are such contextual ones, the authors' share. Changed: see the top of this file; they add a target
    and the mean of what it takes in, in front of the projector.

    Args:
        cls_attention (`torch.Tensor` of shape `(L,)`).
        tower_keys (`torch.Tensor` of shape `(L, heads, h)`): compared by the cosine of their mean over heads.
        count (`int`): how many tokens stay.
    """
    length, contextual = len(cls_attention), round(count * 10 / 64)
    ranked = cls_attention.argsort(descending=True, stable=True)
    dominant, others = ranked[: count - contextual], ranked[count - contextual :].sort().values
    step = max(1, len(others) // max(1, contextual))
    is_target = torch.zeros(len(others), dtype=torch.bool, device=others.device)
    is_target[: step * contextual : step] = True
    targets, rest = others[places(is_target, contextual)], others[places(~is_target, len(others) - contextual)]
    kept = torch.zeros_like(cls_attention, dtype=torch.bool).index_fill_(0, torch.cat([dominant, targets]), True)
    stay = places(kept, count)
    weights = torch.zeros(length, length, device=kept.device)
    weights[stay, stay] = 1.0
    if contextual and len(rest):
        keys = torch.nn.functional.normalize(tower_keys.mean(dim=1), dim=-1)
        share = averages((keys[targets] @ keys[rest].T).argmax(dim=0), contextual).nan_to_num()  # (targets, rest)
        takes = share.sum(dim=1, keepdim=True)  # 1, or 0 where nothing comes
        weights[targets[:, None], rest[None]] = share / 2
        weights[targets, targets] = 1 - takes[:, 0] / 2
    return Choice(kept, weights[stay])


def vispruner(tokens: torch.Tensor, cls_attention: torch.Tensor, count: int) -> Choice:
    """VisPruner (arXiv 2412.01818, section 3.3): half of the tokens that stay are the most attended; the rest is what
    is left of the others once near-duplicates are removed, eight at a time: ranked by attention and split by turns in
    two sets, those of the first with the largest cosine in the second go.

    Args:
        tokens (`torch.Tensor` of shape `(L, d)`).
        cls_attention (`torch.Tensor` of shape `(L,)`).
        count (`int`): how many tokens stay.
    """
    ranked = cls_attention.argsort(descending=True, stable=True)
    important, rest = ranked[: count // 2], ranked[count // 2 :]
    cosines = cosine_matrix(tokens[None])[0]
    diverse = count - count // 2
    while (surplus := len(rest) - diverse) > 0:
        first, second = rest[::2], rest[1::2]
        nearest = cosines[first[:, None], second[None]].amax(dim=1)
        distinct = nearest.argsort(descending=True, stable=True)[min(8, surplus) :]
        rest = torch.cat([first[distinct], second])
    stay = torch.cat([important, rest])
    return Choice(torch.zeros_like(cls_attention, dtype=torch.bool).index_fill_(0, stay, True))


def prumerge(cls_attention: torch.Tensor, tower_keys: torch.Tensor, count: int) -> Choice:
    """LLaVA-PruMerge (arXiv 2403.15388, section 3.2 and 3.3): the most attended tokens stay, and each takes in the 32
    tokens whose keys are most like its own, kept ones among them, in proportion to their attention, its own share 1.

    Changed: as many as the keep ratio says are most attended, where the authors count outliers of the attention, which
    is a number that depends on the image; attention is the mean over heads of the selected layer; no token is added
    that sums up all the others. See the top of this file.

    Args:
        cls_attention (`torch.Tensor` of shape `(L,)`).
        tower_keys (`torch.Tensor` of shape `(L, heads, h)`): compared by cosine, heads side by side.
        count (`int`): how many tokens stay.
    """
    length = len(cls_attention)
    best = cls_attention.argsort(descending=True, stable=True)[:count]
    kept = torch.zeros_like(cls_attention, dtype=torch.bool).index_fill_(0, best, True)
    stay = places(kept, count)
    keys = torch.nn.functional.normalize(tower_keys.flatten(1), dim=-1)
    alike = (keys[stay] @ keys.T).scatter(1, stay[:, None], -torch.inf)  # itself comes in by its own share
    near = alike.argsort(dim=1, descending=True, stable=True)[:, : min(32, length - 1)]
    weights = torch.zeros(count, length, device=kept.device).scatter(1, near, cls_attention[near])
    weights.scatter_(1, stay[:, None], 1.0)
    return Choice(kept, weights / weights.sum(dim=1, keepdim=True))


@over_images
def scope(tokens: torch.Tensor, cls_attention: torch.Tensor, count: int | None) -> torch.Tensor:
    """SCOPE (arXiv 2510.24214, section 3): greedy by saliency times coverage gain, attention_i times what token i adds
    to sum_k max(0, max_{chosen j} c_kj), with c the cosines of tokens, see [`greedy.greedy_coverage`].

    Args:
        tokens (`torch.Tensor` of shape `(images, L, d)`).
        cls_attention (`torch.Tensor` of shape `(images, L)`): a share of its largest value; the scale changes nothing.
        count (`int`, *optional*): how many are chosen; None: all.
    """
    saliency = cls_attention / cls_attention.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    steps = tokens.shape[1] if count is None else count
    return greedy_coverage(cosine_matrix(tokens), torch.ones_like(saliency), saliency, steps)


@over_images
def cdpruner(tokens: torch.Tensor, question: torch.Tensor, count: int | None) -> torch.Tensor:
    """CDPruner (arXiv 2506.10967, section 3.3): greedy MAP of a determinantal point process of kernel r_i c_ij r_j, c
    the cosines of tokens and r their relevance to the question, scaled to [0, 1] over the image, see
    [`greedy.greedy_dpp`].

    Changed: a token's relevance is its mean cosine with the language model's embeddings of the prompt's text. The
    authors compare CLIP's image features with its embedding of the text, negated as those lie the other way round;
    LLaVA checkpoints on the Hub come without the text tower that this takes.

    Args:
        tokens (`torch.Tensor` of shape `(images, L, d)`).
        question (`torch.Tensor` of shape `(images, m, d)`): with no text at all, all tokens are as relevant.
        count (`int`, *optional*): how many are chosen; None: all.
    """
    words = torch.nn.functional.normalize(question, dim=-1).sum(dim=1) / max(1, question.shape[1])
    relevance = (torch.nn.functional.normalize(tokens, dim=-1) @ words[:, :, None])[:, :, 0]
    low, high = relevance.amin(dim=1, keepdim=True), relevance.amax(dim=1, keepdim=True)
    relevance = ((relevance - low + 1e-6) / (high - low + 1e-6)).clamp(0, 1)
    steps = tokens.shape[1] if count is None else count
    return greedy_dpp(tokens, relevance, steps)


def tome(tokens: torch.Tensor, count: int) -> Choice:
    """Bipartite soft matching (ToMe, arXiv 2210.09461, section 3) of the visual tokens: they are split by turns in two
    sets, each token of the first finds the most similar of the second, and the pairs of largest cosine are merged,
    as averages weighted by how many tokens each stands for. At most half of the tokens go in one round; rounds follow
    until `count` are left.

    Changed: ToMe merges a few tokens in every layer of the tower and compares keys; here it is done once, behind the
    projector, by the cosine of the tokens.

    Args:
        tokens (`torch.Tensor` of shape `(L, d)`).
        count (`int`): how many tokens stay.
    """
    length, device = len(tokens), tokens.device
    alive = torch.arange(length, device=device)  # where those that are left stand
    belongs = torch.eye(length, device=device)  # which tokens each place stands for,
    sums = tokens.clone()  # and their sum, which has the direction of their mean
    while (surplus := len(alive) - count) > 0:
        values = torch.nn.functional.normalize(sums[alive], dim=-1)
        first, second = alive[::2], alive[1::2]
        cosine, partner = (values[::2] @ values[1::2].T).max(dim=1)
        order = cosine.argsort(descending=True, stable=True)
        gone, left = order[: min(surplus, len(second))], order[min(surplus, len(second)) :]
        for whole in (belongs, sums):
            whole.index_add_(0, second[partner[gone]], whole[first[gone]])
        alive = torch.cat([first[left], second]).sort().values
    kept = torch.zeros(length, dtype=torch.bool, device=device).index_fill_(0, alive, True)
    members = belongs[alive]
    return Choice(kept, members / members.sum(dim=1, keepdim=True))
