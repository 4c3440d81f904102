"""Write the tables of docs/commands.md from the command line itself.

    python tools/commands.py          # after a command or an option has changed

The text between the marks `<!-- help: NAME -->` and `<!-- end -->` is replaced; a test compares it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from philora.cli.commands import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
MARKED = re.compile(r"(<!-- help: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def commands() -> dict[str, Any]:
    """Return every command by its name."""
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def metavar(argument: Any) -> str:
    """Return an argument as the usage line shows it."""
    said = argument.metavar or str(argument.name).upper()
    return said if argument.required or said.startswith("[") else f"[{said}]"


def section(name: str) -> str:
    """Return the help of a command: its purpose, its usage, and a table of its arguments and options."""
    command = commands()[name]
    shown = [item for item in command.params if not getattr(item, "hidden", False) and item.name != "help"]
    arguments = [item for item in shown if item.param_type_name == "argument"]
    words = " ".join(metavar(item) for item in arguments)
    options = " [OPTIONS]" if len(arguments) < len(shown) else ""
    lines = [f"{command.help}", "", "```text", " ".join(f"philora {name}{options} {words}".split()), "```", ""]
    rows = []
    for item in shown:
        if item.param_type_name == "argument":
            rows.append((f"`{metavar(item)}`", "", item.help or ""))
            continue
        names = ", ".join(f"`{part}`" for part in (*item.opts, *item.secondary_opts))
        default = "" if item.default in (None, False, "", ()) or item.is_flag else f"`{item.default}`"
        rows.append((names, default, item.help or ""))
    if command.epilog:
        example = command.epilog.partition("\n")[0].removeprefix("Example: ")
        lines += [f"Example: `{example}`", ""]
    if rows:
        lines += ["| | default | |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def filled(page: str) -> str:
    """The page with its marked parts as the command line has them."""
    return MARKED.sub(lambda found: f"{found[1]}\n{section(found[2])}\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
