"""A question about images or videos as the text that a processor takes, by the checkpoint's chat template if it has
one."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin


def chat_prompt(processor: ProcessorMixin, content: list[dict[str, Any]]) -> str:
    """One user turn as text, up to where the answer begins.

    Args:
        processor (`ProcessorMixin`): the checkpoint's.
        content (`list[dict[str, Any]]`): the turn's parts in their order, as chat templates take them: `{"type":
            "image"}`, `{"type": "video"}` and `{"type": "text", "text": …}`.

    Returns:
        `str`. Without a chat template every part is a line, an image or video the processor's placeholder.
    """
    if getattr(processor, "chat_template", None) is None:
        lines = [part["text"] if part["type"] == "text" else placeholder(processor, part["type"]) for part in content]
        return "\n".join(lines)
    conversation: list[Any] = [{"role": "user", "content": content}]
    return processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)


def prompt_text(processor: ProcessorMixin, text: str, count: int, modality: str = "image") -> str:
    """A question as a prompt with `count` images or videos: where `<image>` or `<video>` stands in it, or before it.

    Args:
        processor (`ProcessorMixin`): the checkpoint's.
        text (`str`): the question.
        count (`int`): images or videos that it is about.
        modality (`str`, defaults to `"image"`): `"image"` or `"video"`.

    Raises:
        ValueError: if the text has placeholders, but not that many.
    """
    mark = f"<{modality}>"
    pieces = text.split(mark)
    if len(pieces) == 1:
        pieces = [""] * count + pieces
    if len(pieces) - 1 != count:
        raise ValueError(f"{text!r} has {len(pieces) - 1} times {mark}, but comes with {count} {modality}s.")
    content: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        if number > 0:
            content.append({"type": modality})
        if piece.strip():
            content.append({"type": "text", "text": piece.strip()})
    return chat_prompt(processor, content)


def placeholder(processor: ProcessorMixin, modality: str) -> str:
    """The token that stands for an image (`modality="image"`) or video (`"video"`) in a prompt."""
    return getattr(processor, f"{modality}_token")
