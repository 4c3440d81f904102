"""Run the command line: all commands, and the handling of their errors.

Exit codes: 0 done; 1 a run failed; 2 usage, configuration or data; 3 a run was stopped by a signal after it had saved a
checkpoint, and names the command that resumes it; 130 (Ctrl-C) and 143 (SIGTERM) if nothing was saved to resume from.
With --json standard output is one JSON document.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from rich.markup import escape

from philora.cli import data_commands, help_commands, model_commands, run_commands, use_commands
from philora.cli.application import GROUPS, app, err, out
from philora.cli.options import FILE_TYPES, FORMATS, LAYOUTS
from philora.errors import PhiloraError
from philora.runtime import process_state, processes

MODULES = (data_commands, run_commands, use_commands, model_commands, help_commands)
"""Importing these modules adds their commands to the application."""

app.registered_commands.sort(key=lambda command: GROUPS.index(str(command.rich_help_panel)))


def _arguments(arguments: list[str]) -> list[str]:
    """Allow `--resume` without a value."""
    return ["--resume=yes" if argument == "--resume" else argument for argument in arguments]


def main() -> None:
    """Run the command line; each philora error becomes one readable message and its exit code."""
    # GNU's OpenMP reads it when torch loads. By default its threads spin for a long time while they wait, which makes a
    # run more than ten times slower as soon as another process uses a core.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with process_state.run():
            if app(args=_arguments(sys.argv[1:]), standalone_mode=False) == 130:  # typer returns it after Ctrl-C
                raise KeyboardInterrupt
    except PhiloraError as error:
        _fail(str(error), error.exit_code, error)
    except KeyboardInterrupt:
        _fail("stopped", 130, None)
    except Exception as error:
        if isinstance(error, typer.Exit):
            sys.exit(error.exit_code)
        show = getattr(error, "show", None)
        if show is not None:  # a usage error of the parser
            show()
            sys.exit(2)
        if os.environ.get("PHILORA_DEBUG"):
            raise
        _fail(f"{type(error).__name__}: {error}\n(philora --debug shows the traceback)", 1, error)


def _fail(text: str, code: int, error: Any) -> None:
    """Print one message for all processes, and exit with the code of the first error."""
    with processes.last_word(text, code, error) as (speaks, code):
        if speaks and error is not None and os.environ.get("PHILORA_DEBUG"):
            err.print_exception()
        if speaks:
            err.print(f"[red]philora:[/] {escape(text)}", highlight=False)
            from philora.cli.troubleshooting import entry_of

            if (entry := entry_of(text)) is not None:
                err.print(f"[dim]help: philora explain {entry.name}[/]", highlight=False)
    sys.exit(code)


__all__ = ["FILE_TYPES", "FORMATS", "LAYOUTS", "app", "err", "main", "out"]


if __name__ == "__main__":
    main()
