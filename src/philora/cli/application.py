"""Define what all commands share: the application, its consoles, its log lines, and output as JSON."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from philora import __version__
from philora.errors import ConfigError, fault
from philora.reporting import display
from philora.runtime import processes

Command = TypeVar("Command", bound=Callable[..., Any])

GROUP_DATA = "Data and configuration"
GROUP_RUN = "Train and judge"
GROUP_USE = "Chat and serve"
GROUP_SHARE = "Merge, export and publish"
GROUP_HELP = "Help"
GROUPS = (GROUP_DATA, GROUP_RUN, GROUP_USE, GROUP_SHARE, GROUP_HELP)
"""The groups of commands, in the order of the help."""

app = typer.Typer(
    name="philora",
    help="Fine-tune Phi language models with LoRA on your own chat data.",
    epilog="A first run in a few minutes: philora demo. Options of a command: philora COMMAND --help. "
    "Documentation: https://pypi.org/project/philora/",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = display.SafeConsole(soft_wrap=True)
err = display.SafeConsole(stderr=True, soft_wrap=True)


def add_command(group: str, page: str, example: str, name: str | None = None) -> Callable[[Command], Command]:
    """Add a function to the commands, in a group of the help that ends with an example and a page of `docs/`."""
    return app.command(name, rich_help_panel=group, epilog=f"Example: {example}\n\nMore: docs/{page}")


def _version(shown: bool) -> None:
    if shown:
        out.print(f"philora {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if debug:
        os.environ["PHILORA_DEBUG"] = "1"
    name = context.invoked_subcommand
    if processes.count() > 1 and name != "train":
        todo = f"Start it without a launcher: philora {name}"
        raise ConfigError(fault("philora", "command", name, "train, the command that several processes share", todo))


def print_json(data: dict[str, Any]) -> None:
    """Print a result as one JSON document."""
    from philora.files.checkpoint import as_json

    sys.stdout.write(as_json(data))


def plain_values(value: Any) -> Any:
    """Return a result as values for JSON."""
    if hasattr(value, "_asdict"):
        return {key: plain_values(item) for key, item in value._asdict().items()}
    return value.to_dict() if hasattr(value, "to_dict") else value


def set_up_logging(level: str) -> None:
    """Show philora's log lines from `level` on, and hide those of the libraries."""

    lines = display.log_lines(err, level)
    if not processes.is_main():  # the first process warns for all
        warnings.simplefilter("ignore")
    root = logging.getLogger(display.ROOT)
    root.handlers[:] = [lines]
    root.propagate = False
    root.setLevel(min(logging.INFO, lines.level))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # logs about optional kernels on import
    display.ignore_future_warnings()
    if not (err.is_terminal and processes.is_main()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quiet_transformers() -> None:
    """Hide the tokenizer's messages about refused prompts, and loading bars where there is no terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not err.is_terminal:
        transformers_logging.disable_progress_bar()
