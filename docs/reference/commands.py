"""A hook of mkdocs: the options of every `rbl` command, from the program itself, under its heading in commands.md. Used
by mkdocs.yml, no part of the package."""

from __future__ import annotations

import re

from typer.main import get_command


HEADING = re.compile(r"^## rbl (\w+)$", re.MULTILINE)


def commands() -> dict:
    """The commands of `rbl` by name."""
    from transformers_rbl.cli import app

    return get_command(app).commands


def table(command) -> str:
    """A command's arguments and options as a Markdown table."""
    lines = [command.help.split("\n")[0], "", "| option | default | |", "| --- | --- | --- |"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        is_argument = parameter.param_type_name == "argument"
        name = parameter.name.upper() if is_argument else parameter.opts[0]
        default = "" if parameter.default in (None, "", False) else parameter.default
        text = (parameter.help or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {'required' if parameter.required else default} | {text} |")
    return "\n".join(lines)


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    if page.file.src_uri != "reference/commands.md":
        return markdown
    known = commands()
    written = HEADING.findall(markdown)
    for name in written:
        if name not in known:
            raise ValueError(f"{page.file.src_uri} has a section about rbl {name}, which is no command.")
    markdown = HEADING.sub(lambda match: f"{match.group(0)}\n\n{table(known[match.group(1)])}", markdown)
    rest = [name for name in known if name not in written]
    return markdown + "".join(f"\n\n## rbl {name}\n\n{table(known[name])}" for name in rest)
