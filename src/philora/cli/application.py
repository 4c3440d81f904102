"""Define what all commands share: the application, its consoles, the options that several have, and output as JSON."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from philora import __version__
from philora.errors import ConfigError, fault
from philora.reporting import display
from philora.runtime import processes

GROUP_DATA = "Data and configuration"
GROUP_RUN = "Train and judge"
GROUP_USE = "Chat and serve"
GROUP_SHARE = "Merge, export and publish"
GROUP_HELP = "Help"
GROUPS = (GROUP_DATA, GROUP_RUN, GROUP_USE, GROUP_SHARE, GROUP_HELP)
"""The groups of commands in the order of the help."""

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


def _complete_setting(incomplete: str) -> list[str]:
    """Return the settings that a word of the shell may become: those of philora, TRL and PEFT, by their source."""
    from philora.configuration import schema
    from philora.configuration.fields import FIELDS

    libraries = {"training_config": schema.training_fields(), "peft_config": schema.lora_fields()}
    names = {*FIELDS, *(f"{section}.{name}" for section, fields in libraries.items() for name in fields)}
    return sorted(f"{entry}=" for entry in names if entry.startswith(incomplete))


def _complete_run(incomplete: str) -> list[str]:
    """Return the run folders that a word of the shell may become, and the folders on the way to them."""
    start = Path(incomplete)
    around, beginning = (start, "") if incomplete.endswith("/") or not incomplete else (start.parent, start.name)
    folders = [file for file in sorted(around.glob("*")) if file.is_dir() and file.name.startswith(beginning)]
    folders += [] if incomplete else sorted(file.parent for file in Path().glob("runs/*/config.yaml"))
    shown = [folder for folder in folders if not folder.name.startswith(".") or beginning.startswith(".")]
    return [str(item) if (item / "config.yaml").is_file() else f"{item}/" for item in shown]


def _setting(flag: str, help: str) -> Any:
    """Return an option that is a setting of the configuration, which checks its value."""
    return typer.Option(flag, help=help, show_default=False, rich_help_panel="Settings")


ConfigArgument = Annotated[
    str, typer.Argument(help="YAML file of the run, or its data: a file or folder.", metavar="CONFIG_OR_DATA")
]
AdapterArgument = Annotated[
    str,
    typer.Argument(
        help="Run folder, adapter folder, loralib file or hub id (OWNER/NAME/SUBFOLDER@REVISION).",
        metavar="RUN_OR_ADAPTER",
        autocompletion=_complete_run,
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base", help="Base model; default: the run's, or the one that the adapter names.", show_default=False
    ),
]
HostOption = Annotated[str, typer.Option("--host", help="Address to listen on; beyond this machine it needs a key.")]
PortOption = Annotated[int, typer.Option("--port", help="Port; 0 takes one that is free.", min=0, max=65535)]
KeyOption = Annotated[
    str | None,
    typer.Option("--api-key", envvar="PHILORA_API_KEY", help="Key that requests must bring.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that go over the file's.", metavar="[KEY=VALUE]...", autocompletion=_complete_setting
    ),
]
ModelFlag = Annotated[str | None, _setting("--model", "Base: a hub id, a folder, or a name such as phi-3-mini.")]
EvalFlag = Annotated[str | None, _setting("--eval", "Held-out data: a file, or a share of the data such as 0.1.")]
OutFlag = Annotated[str | None, _setting("--out", "Run folder.")]
EpochsFlag = Annotated[str | None, _setting("--epochs", "Passes over the data.")]
LearningRateFlag = Annotated[str | None, _setting("--learning-rate", "At its peak, such as 1e-4.")]
BatchSizeFlag = Annotated[str | None, _setting("--batch-size", "Rows of a micro-batch on each device.")]
MaxLengthFlag = Annotated[str | None, _setting("--max-length", "Longest row, in tokens.")]
SeedFlag = Annotated[str | None, _setting("--seed", "Of the split, the order and the adapter's start.")]
RankFlag = Annotated[str | None, _setting("--rank", "Rank of the adapter.")]
AlphaFlag = Annotated[str | None, _setting("--alpha", "Its multiplier is alpha / rank.")]
DropoutFlag = Annotated[str | None, _setting("--dropout", "On the adapter's input.")]
TargetsFlag = Annotated[str | None, _setting("--target-modules", "Such as q_proj,v_proj; all-linear: all of them.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Show warnings and what goes wrong, nothing else.")]

# For completion, which must not load torch; `philora.exporting` has the same words.
FORMATS = ("peft", "loralib", "gguf", "ollama")
LAYOUTS = ("server", "fused", "slices", "merged", "adapter", "base+adapter")
FILE_TYPES = ("f16", "q8_0", "f32")
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
SampleOption = Annotated[bool, typer.Option("--sample", help="Draw each token; default: the likeliest.")]
TemperatureOption = Annotated[float | None, typer.Option(help="Of sampling; default: the model's own.")]
TopPOption = Annotated[float | None, typer.Option(help="Of sampling; default: the model's own.")]
TopKOption = Annotated[int | None, typer.Option(help="Of sampling; default: the model's own.")]
SeedOption = Annotated[int, typer.Option(help="Of sampling.")]
ControlTokensOption = Annotated[
    bool,
    typer.Option("--control-tokens", help="Read control tokens inside messages as such; default: as text."),
]


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
    """Return a result as values that JSON has."""
    if hasattr(value, "_asdict"):
        return {key: plain_values(item) for key, item in value._asdict().items()}
    return value.to_dict() if hasattr(value, "to_dict") else value


def set_up_logging(level: str) -> None:
    """Show philora's log lines from `level` on, and keep the libraries' chatter off the terminal."""

    lines = display.log_lines(err, level)
    if not processes.is_main():  # what the first process says, it says for all
        warnings.simplefilter("ignore")
    root = logging.getLogger(display.ROOT)
    root.handlers[:] = [lines]
    root.propagate = False
    root.setLevel(min(logging.INFO, lines.level))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # speaks of optional kernels on import
    display.ignore_future_warnings()
    if not (err.is_terminal and processes.is_main()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def quiet_transformers() -> None:
    """Keep the tokenizer's words about refused prompts away, and bars of loading from what is no terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not err.is_terminal:
        transformers_logging.disable_progress_bar()
