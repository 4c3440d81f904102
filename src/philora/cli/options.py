"""Define the options that several commands have, and what the shell completes them to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from philora.interface.choices import SETTINGS


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
    str, typer.Option("--host", help="Address to listen on. One that other machines can reach needs --api-key.")
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


# Of `evaluate` alone; its function would be hard to read with them.
EvaluationDataOption = Annotated[
    str | None, typer.Option(help="File or folder of rows to score. Default: the rows that the run held out.")
]
AnswersOption = Annotated[
    int | None,
    typer.Option(min=0, help="Number of answers to generate; 0: none. Default: as in the run, else 200."),
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Number of rows to score at most. Default: all.")]
MetricsOption = Annotated[
    str | None,
    typer.Option(
        help="Metrics of the answers, separated by commas: rouge, bleu, chrf. Default: all that are installed."
    ),
]
JudgeOption = Annotated[
    str | None,
    typer.Option(help="Command that reads answers as JSONL on standard input and writes their scores. Default: none."),
]
ForgettingOption = Annotated[
    bool,
    typer.Option(help="Also score bundled general prompts and texts, to see what training made the model forget."),
]
KeepTrainingRowsOption = Annotated[
    bool,
    typer.Option(
        "--keep-training-rows", help="Also score rows that the training set contains. Default: they are left out."
    ),
]
AnswerLengthOption = Annotated[
    int | None, typer.Option(help="Length limit of an answer, in tokens. Default: as in the run, else 256.")
]
AnswerBatchOption = Annotated[
    int | None, typer.Option(help="Number of answers generated at a time. Default: as in the run, else 16.")
]
EvaluationFolderOption = Annotated[
    str | None, typer.Option("--out", help="Folder for the results. Default: evaluation/ in the run folder.")
]
