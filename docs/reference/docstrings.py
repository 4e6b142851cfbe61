"""A griffe extension: this library's docstrings, written as transformers writes its own, as plain Markdown.

An `Args:` block becomes a list, and a name in brackets and backticks a link where the reference documents it. Used by
mkdocs.yml, no part of the package.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from griffe import Docstring, Extension


SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):\n((?:    .*\n?|\n)+)", re.MULTILINE)
TITLES = {"Args": "Arguments"}
NAMES = re.compile(r"(^|\), )([\w*]+(?:, [\w*]+)*)(?=[ :])")  # before their types, or before the colon
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\[|\()")


def documented() -> dict[str, str]:
    """Full names of what the pages of the reference document, by the last one and two parts of each."""
    found = {}
    for page in Path(__file__).parent.glob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            parts = name.split(".")
            found[parts[-1]] = found[".".join(parts[-2:])] = found[name] = name
    return found


def to_markdown(text: str, links: dict[str, str]) -> str:
    """A docstring as Markdown; `links` as [`documented`] gives them."""
    text = SECTION.sub(_section, text.rstrip() + "\n")
    return REFERENCE.sub(lambda match: _link(match.group(1), links), text)


def _section(match: re.Match) -> str:
    title, body = match.group(1), textwrap.dedent(match.group(2)).strip("\n")
    if title == "Returns":
        return f"**Returns:** {' '.join(body.split())}\n\n"
    lines = []
    for item in re.split(r"\n(?=\S)", body):
        head, colon, rest = " ".join(item.split()).partition(": ")
        lines.append(f"- {NAMES.sub(lambda names: f'{names[1]}`{names[2]}`', head + colon)}{rest}")
    return f"**{TITLES.get(title, title)}:**\n\n" + "\n".join(lines) + "\n\n"


def _link(name: str, links: dict[str, str]) -> str:
    target = links.get(name)
    return f"`{name}`" if target is None else f"[`{name.rpartition('.')[2]}`][{target}]"


class PlainDocstrings(Extension):
    def __init__(self):
        self.links = documented()

    def on_object(self, *, obj, **kwargs) -> None:
        if obj.docstring is not None:
            old = obj.docstring
            obj.docstring = Docstring(to_markdown(old.value, self.links), lineno=old.lineno, parent=obj, parser=None)
