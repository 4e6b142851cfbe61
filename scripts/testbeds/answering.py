"""Answers of a testbed's model to all questions of an example in one pass, for training and for comparing rules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tiny_checkpoint

from .testbed import Example


# Around images and question: what `tiny_checkpoint.CHAT_TEMPLATE` makes of a user's message, token for token.
HEAD, TAIL = "<s>USER:", " ASSISTANT:"


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    features: Sequence[Sequence[torch.Tensor]],
    batch: Sequence[Example],
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Ask an example's questions side by side: they share its images and do not see each other (a mask of blocks).

    Returns:
        The loss; per question whether every answer token, the end included, is the likeliest (what greedy decoding
        would say); and the same `(batch, questions)`.
    """
    head, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in (HEAD, TAIL))
    captions = [tokenizer(caption, add_special_tokens=False).input_ids for caption in batch[0].captions()]
    rows = []
    for images, example in zip(features, batch):
        prefix = len(head) + sum(map(len, captions)) + sum(map(len, images))
        ids, blocks, targets, positions = [], [0] * prefix, [-100] * prefix, list(range(prefix))
        for number, (_, question, reply) in enumerate(example.questions, start=1):
            asked = tokenizer(question).input_ids + tail
            expected = [*tokenizer(reply).input_ids, tiny_checkpoint.EOS]
            ids += asked + expected[:-1]
            blocks += [number] * (len(asked) + len(expected) - 1)
            targets += [-100] * (len(asked) - 1) + expected
            positions += range(prefix, prefix + len(asked) + len(expected) - 1)
        rows.append((ids, blocks, targets, positions))
    longest = max(len(blocks) for _, blocks, _, _ in rows)
    embed = model.get_input_embeddings()
    words = [embed(torch.tensor(ids, dtype=torch.long)) for ids in captions]
    words[0] = torch.cat([embed(torch.tensor(head)), words[0]])
    embeds, block, target, position = [], *(torch.full((len(rows), longest), fill) for fill in (-1, -100, 0))
    for row, (images, (ids, blocks, targets, positions)) in enumerate(zip(features, rows)):
        shared = [part for pair in zip(words, images, strict=True) for part in pair]
        prompt = torch.cat([*shared, embed(torch.tensor(ids))])
        embeds.append(F.pad(prompt, (0, 0, 0, longest - len(blocks))))
        for table, values in ((block, blocks), (target, targets), (position, positions)):
            table[row, : len(values)] = torch.tensor(values)
    mask = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    mask = (mask & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]
    hidden = model.model.language_model(
        inputs_embeds=torch.stack(embeds), attention_mask=mask, position_ids=position, use_cache=False
    ).last_hidden_state
    replying = target != -100
    logits, wanted = model.lm_head(hidden[replying]).float(), target[replying]
    wrong = torch.zeros(len(rows), len(batch[0].questions) + 1).index_put_(
        (torch.nonzero(replying)[:, 0], block[replying]), (logits.argmax(-1) != wanted).float(), accumulate=True
    )
    right = wrong[:, 1:] == 0
    names = [kind for kind, _, _ in batch[0].questions]  # the first of a kind is what is evaluated
    return F.cross_entropy(logits, wanted), dict(zip(names[::-1], right.T.flip(0))), right
