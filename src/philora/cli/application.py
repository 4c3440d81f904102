"""Define what all commands share: the application, its consoles, the options that several have, and output as JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from philora import __version__
from philora.errors import ConfigError, fault
from philora.interface.choices import SETTINGS
from philora.reporting import display
from philora.runtime import processes

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


def _complete_setting(incomplete: str) -> list[str]:
    """Complete a word in the shell to settings of philora, TRL and PEFT."""
    from philora.configuration import schema
    from philora.configuration.fields import FIELDS

    libraries = {"training_config": schema.training_fields(), "peft_config": schema.lora_fields()}
    names = {*FIELDS, *(f"{section}.{name}" for section, fields in libraries.items() for name in fields)}
    return sorted(f"{entry}=" for entry in names if entry.startswith(incomplete))


def _complete_run(incomplete: str) -> list[str]:
    """Complete a word in the shell to run folders, and to folders on the path to them."""
    start = Path(incomplete)
    around, beginning = (start, "") if incomplete.endswith("/") or not incomplete else (start.parent, start.name)
    folders = [file for file in sorted(around.glob("*")) if file.is_dir() and file.name.startswith(beginning)]
    folders += [] if incomplete else sorted(file.parent for file in Path().glob("runs/*/config.yaml"))
    shown = [folder for folder in folders if not folder.name.startswith(".") or beginning.startswith(".")]
    return [str(item) if (item / "config.yaml").is_file() else f"{item}/" for item in shown]


def closing(page: str, example: str) -> str:
    """Return the end of a command's help: an example, and the page of the documentation that explains the command.

    The pages are files of the source distribution.
    """
    return f"Example: {example}\n\nMore: docs/{page}"


# Stated defaults are those of `configuration.fields`; a test compares them.
_SETTINGS = {
    "--model": ("<model>", "Base model: a hub id, a folder, or a short name such as phi-3-mini. Default: nano, the "
                "bundled toy; for data alone, a Phi model that fits this machine."),
    "--eval": ("<data|share>", "Held-out data: a file, a number of rows, or a share of the training data. Default: "
               "0.05; 0.1 of data alone with fewer than 1,000 records."),
    "--out": ("<folder>", "Run folder. Default: runs/NAME, after the name of the configuration or data."),
    "--epochs": ("<number>", "Passes over the training data. Default: 3."),
    "--learning-rate": ("<number>", "Peak learning rate, such as 1e-4. Default: auto, which is 2e-4 * 3072 / the "
                        "model's hidden size."),
    "--batch-size": ("<rows>", "Rows of a micro-batch on each device. Default: auto, as many as the memory estimate "
                     "allows."),
    "--max-length": ("<tokens>", "Longest row, in tokens. Default: 2048."),
    "--seed": ("<number>", "Seed of the held-out split, the order of the data, dropout and the adapter's initial "
               "weights. Default: 42."),
    "--rank": ("<number>", "Rank of the adapter's matrices. Default: 16."),
    "--alpha": ("<number>", "Scale of the adapter: its update is multiplied by alpha / rank. Default: 32."),
    "--dropout": ("<share>", "Dropout on the adapter's input: the share of values set to zero. Default: 0.05."),
    "--target-modules": ("<names>", "Linear layers to adapt, separated by commas, such as q_proj,v_proj. Default: "
                         "all-linear, which is all."),
}  # fmt: skip


def _setting(flag: str) -> Any:
    """Return an option that is a setting of the configuration, which checks its value."""
    metavar, text = _SETTINGS[flag]
    return typer.Option(flag, help=text, metavar=metavar, show_default=False, rich_help_panel="Settings")


ConfigArgument = Annotated[
    str,
    typer.Argument(
        help="YAML file with the configuration of a run; or data: a file or folder of conversations.",
        metavar="CONFIG_OR_DATA",
    ),
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
        "--base",
        help="Base model: a hub id or folder. Default: the base of the run, or the one that the adapter names.",
        show_default=False,
    ),
]
HostOption = Annotated[
    str,
    typer.Option("--host", help="Address to listen on. One that other machines can reach needs --api-key."),
]
PortOption = Annotated[int, typer.Option("--port", help="Port to listen on. 0 takes a free one.", min=0, max=65535)]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar="PHILORA_API_KEY",
        help="Key that every request must carry. Default: no key.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that replace those of the configuration, such as training_config.max_steps=50.",
        metavar="[KEY=VALUE]...",
        autocompletion=_complete_setting,
    ),
]
ModelFlag = Annotated[str | None, _setting("--model")]
EvalFlag = Annotated[str | None, _setting("--eval")]
OutFlag = Annotated[str | None, _setting("--out")]
EpochsFlag = Annotated[str | None, _setting("--epochs")]
LearningRateFlag = Annotated[str | None, _setting("--learning-rate")]
BatchSizeFlag = Annotated[str | None, _setting("--batch-size")]
MaxLengthFlag = Annotated[str | None, _setting("--max-length")]
SeedFlag = Annotated[str | None, _setting("--seed")]
RankFlag = Annotated[str | None, _setting("--rank")]
AlphaFlag = Annotated[str | None, _setting("--alpha")]
DropoutFlag = Annotated[str | None, _setting("--dropout")]
TargetsFlag = Annotated[str | None, _setting("--target-modules")]
QuietFlag = Annotated[bool, typer.Option("--quiet", help="Show only warnings and errors.")]

# For completion, which must not load torch; `philora.exporting` has the same values.
FORMATS = ("peft", "loralib", "gguf", "ollama")
LAYOUTS = ("server", "fused", "slices", "merged", "adapter", "base+adapter")
FILE_TYPES = ("f16", "q8_0", "f32")
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document and nothing else.")]
SampleOption = Annotated[
    bool, typer.Option("--sample", help="Draw each token at random. Default: always take the likeliest.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(help="Temperature of --sample: above 1 more varied, below 1 less. Default: the model's own."),
]
TopPOption = Annotated[
    float | None,
    typer.Option(
        help="Sample from the likeliest tokens that together have this probability. Default: the model's own."
    ),
]
TopKOption = Annotated[
    int | None, typer.Option(help="Sample from this many of the likeliest tokens. Default: the model's own.")
]
MaxNewTokensOption = Annotated[int, typer.Option(help="Length limit of an answer, in tokens.")]
StopOption = Annotated[list[str] | None, typer.Option(help="Text that ends an answer. May be repeated. Default: none.")]
SeedOption = Annotated[int, typer.Option(help="Seed of --sample.")]
ControlTokensOption = Annotated[
    bool,
    typer.Option(
        "--control-tokens",
        help="Let text such as <|end|> inside a message act as a control token. Default: it is ordinary text.",
    ),
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


def flag_overrides(context: typer.Context) -> list[str]:
    """Return the given options that are settings, as overrides."""
    given = []
    for name, key in SETTINGS.items():
        value = context.params[name]
        if value is None:
            continue
        if name == "target_modules" and "," in value:
            value = json.dumps([part.strip() for part in value.split(",")])
        elif name in ("model", "output") or (name == "evaluation" and Path(value).expanduser().exists()):
            value = json.dumps(value, ensure_ascii=False)  # always text, even if YAML would read a number
        given.append(f"{key}={value}")
    return given
