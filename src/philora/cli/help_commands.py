"""Define the commands for help: doctor, explain."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from philora.cli import options
from philora.cli.application import GROUP_HELP, add_command, err, out, print_json, set_up_logging
from philora.reporting import display


@add_command(GROUP_HELP, "platforms.md", "philora doctor")
def doctor(as_json: options.JsonOption = False) -> None:
    """Check this machine: Python, packages, device, compiler, caches, disk, the connection to the Hub."""
    set_up_logging("warning")
    with err.status("looking"):
        from philora.cli.doctor import examine

        found = examine()
    broken = [item.name for item in found if item.status == "fault"]
    if as_json:
        print_json({"works": not broken, "findings": [item._asdict() for item in found]})
    else:
        colours = {"ok": "green", "note": "yellow", "fault": "red"}
        for item in found:
            todo = f"  {item.todo}" if item.todo else ""
            line = (
                f"[{colours[item.status]}]{item.status.ljust(5)}[/] {item.name.ljust(16)} {escape(item.value + todo)}"
            )
            out.print(line, highlight=False)
        out.print(f"\n{'does not work: ' + ', '.join(broken) if broken else 'philora works here'}", highlight=False)
    if broken:
        sys.exit(1)


@add_command(GROUP_HELP, "troubleshooting.md", "philora explain")
def explain(
    entry: Annotated[
        str | None, typer.Argument(help="Name of an entry, as an error message gives it. Default: list all entries.")
    ] = None,
) -> None:
    """Explain an error message and what to do about it, from the troubleshooting page."""
    from philora.cli.troubleshooting import entries, entry_named

    if entry is None:
        table = Table("name", "", box=None)
        for item in entries():
            table.add_row(item.name, escape(item.title))
        display.print_whole(out, table)
        return
    found = entry_named(entry)
    out.print(f"[bold]{escape(found.title)}[/]\n", highlight=False)
    out.print(escape("\n".join(found.forms)), style="dim", highlight=False)
    out.print(f"\n{escape(found.text)}", highlight=False)
