"""Answers of a testbed's model to all questions of an example in one pass, for training and for comparing rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .testbed import Example
from .tokens import Visual, family_of


@dataclass(frozen=True)
class Frame:
    """What a family's chat template puts around a user's message (`head`, `tail`), around each image (`before`,
    `after`), and for the image (`placeholder`), token for token."""

    head: str
    tail: str
    before: str = ""
    after: str = ""
    placeholder: str = "<image>"

    def prompt(self, example: Example, question: str) -> str:
        image = f"{self.before}{self.placeholder}{self.after}"
        return f"{self.head} {example.prompt(question).replace('<image>', image)}{self.tail}"


LLAVA = Frame("<s>USER:", " ASSISTANT:")
CHATML = Frame("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", after="\n")  # SmolLM2's
FRAMES = {
    "qwen3_vl": Frame(
        "<|im_start|>user", "<|im_end|><|im_start|>assistant", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
    )
}


def frame_of(family: str, tokenizer: PreTrainedTokenizerFast | None = None) -> Frame:
    """A family's frame; LLaVA's language model, known by its `tokenizer`, may bring its own."""
    if family == "llava" and tokenizer is not None and "<|im_start|>" in tokenizer.all_special_tokens:
        return CHATML
    return FRAMES.get(family, LLAVA)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    features: Sequence[Sequence[Visual]],
    batch: Sequence[Example],
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Ask an example's questions side by side: they share its images and do not see each other (a mask of blocks).

    Returns:
        The loss; per question whether every answer token, the end included, is the likeliest (what greedy decoding
        would say); and the same `(batch, questions)`.
    """
    frame, end = frame_of(family_of(model.config), tokenizer), model.config.text_config.eos_token_id
    head, before, after, tail = (
        tokenizer(part, add_special_tokens=False).input_ids
        for part in (frame.head, frame.before, frame.after, frame.tail)
    )
    words = [tokenizer(caption, add_special_tokens=False).input_ids + before for caption in batch[0].captions()]
    words = [[*(after if number else head), *ids] for number, ids in enumerate(words)]
    rows = []
    for images, example in zip(features, batch):
        places, start = place_prompt(words, images, len(after))
        prefix = len(places)
        ids, blocks, targets, positions = list(after), [0] * prefix, [-100] * prefix, [places]
        for number, (_, question, reply) in enumerate(example.questions, start=1):
            asked = tokenizer(question).input_ids + tail
            expected = [*tokenizer(reply).input_ids, end]
            ids += asked + expected[:-1]
            blocks += [number] * (len(asked) + len(expected) - 1)
            targets += [-100] * (len(asked) - 1) + expected
            positions.append(count_from(start, len(asked) + len(expected) - 1))
        rows.append((ids, blocks, targets, torch.cat(positions)))
    longest = max(len(blocks) for _, blocks, _, _ in rows)
    embed = model.get_input_embeddings()
    captions = [embed(torch.tensor(ids, dtype=torch.long)) for ids in words]
    embeds, block, target = [], *(torch.full((len(rows), longest), fill) for fill in (-1, -100))
    position, visual = torch.zeros(len(rows), longest, 3, dtype=torch.long), torch.zeros(len(rows), longest).bool()
    for row, (images, (ids, blocks, targets, positions)) in enumerate(zip(features, rows)):
        shared = [part for text, image in zip(captions, images, strict=True) for part in (text, image.tokens)]
        prompt = torch.cat([*shared, embed(torch.tensor(ids))])
        embeds.append(F.pad(prompt, (0, 0, 0, longest - len(blocks))))
        block[row, : len(blocks)], target[row, : len(blocks)] = torch.tensor(blocks), torch.tensor(targets)
        position[row, : len(blocks)] = positions
        start = 0
        for text, image in zip(words, images):
            visual[row, start + len(text) : start + len(text) + len(image)] = True
            start += len(text) + len(image)
    placed = {"position_ids": position[..., 0]}
    if features[0][0].views:
        layers = zip(*(image.views for images in features for image in images))
        placed = {
            "position_ids": position.permute(2, 0, 1),
            "visual_pos_masks": visual,
            "deepstack_visual_embeds": [torch.cat(layer) for layer in layers],
        }
    mask = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    mask = (mask & torch.ones(longest, longest, dtype=torch.bool).tril())[:, None]
    hidden = model.model.language_model(
        inputs_embeds=torch.stack(embeds), attention_mask=mask, **placed, use_cache=False
    ).last_hidden_state
    replying = target != -100
    logits, wanted = model.lm_head(hidden[replying]).float(), target[replying]
    wrong = torch.zeros(len(rows), len(batch[0].questions) + 1).index_put_(
        (torch.nonzero(replying)[:, 0], block[replying]), (logits.argmax(-1) != wanted).float(), accumulate=True
    )
    right = wrong[:, 1:] == 0
    names = [kind for kind, _, _ in batch[0].questions]  # the first of a kind is what is evaluated
    return F.cross_entropy(logits, wanted), dict(zip(names[::-1], right.T.flip(0))), right


def place_prompt(words: Sequence[Sequence[int]], images: Sequence[Visual], after: int) -> tuple[torch.Tensor, int]:
    """Positions `(n, 3)` of what the questions share: words before each image, images, `after` tokens at the end; and
    the position of what comes next."""
    parts, start = [], 0
    for text, image in zip(words, images):
        parts.append(count_from(start, len(text)))
        start += len(text)
        if image.places is None:
            parts.append(count_from(start, len(image)))
            start += len(image)
        else:
            parts.append(start + image.places.T)
            start += image.extent
    parts.append(count_from(start, after))
    return torch.cat(parts), start + after


def count_from(start: int, length: int) -> torch.Tensor:
    """`(length, 3)`: positions of text."""
    return torch.arange(start, start + length)[:, None].expand(-1, 3)
