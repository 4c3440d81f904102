"""Define the commands for data and configurations: init, check, data, config."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from philora.cli import options
from philora.cli.application import GROUP_DATA, add_command, err, out, print_json, set_up_logging
from philora.errors import ConfigError, fault
from philora.interface.choices import choose, refuse_other_overrides, stem
from philora.reporting import display

if TYPE_CHECKING:
    from philora.training.readiness import Preflight


@add_command(GROUP_DATA, "quickstart.md", "philora init support.csv --model phi-3-mini")
def init(
    data: Annotated[str, typer.Argument(help="Conversations: a file, a folder or a hub id.", metavar="DATA")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help='How the data is read, such as \'data.train.columns={user: "{Q}", assistant: "{A}"}\'.',
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: a hub id, a folder, or a name such as phi-3-mini. Default: one that fits this machine."
        ),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--out", help="YAML file to write. Default: named after the data.")
    ] = None,
) -> None:
    """Write a short configuration for DATA, and check it."""
    set_up_logging("warning")
    from philora.files.checkpoint import write_text

    refuse_other_overrides(overrides or [])
    file = Path(output) if output else Path(f"{stem(data)}.yaml")
    if file.exists():
        expected = "a file that does not exist yet"
        raise ConfigError(fault("init", "out", str(file), expected, "Give another with --out, or remove this one"))
    with err.status("looking at the data"):
        from philora.planning.starter import start

        begun = start(data, model, overrides=overrides or [])
    write_text(file, begun.text)
    out.print(f"{file}: {begun.found}\n", highlight=False, markup=False)
    out.print(begun.text, highlight=False, markup=False)
    _check_run(str(file), [], f"philora train {shlex.quote(str(file))}", False, False)


@add_command(GROUP_DATA, "quickstart.md", "philora check support.yaml")
def check(
    context: typer.Context,
    config: options.ConfigArgument,
    overrides: options.Overrides = None,
    model: options.ModelFlag = None,
    evaluation: options.EvalFlag = None,
    output: options.OutFlag = None,
    epochs: options.EpochsFlag = None,
    learning_rate: options.LearningRateFlag = None,
    batch_size: options.BatchSizeFlag = None,
    max_length: options.MaxLengthFlag = None,
    seed: options.SeedFlag = None,
    rank: options.RankFlag = None,
    alpha: options.AlphaFlag = None,
    dropout: options.DropoutFlag = None,
    target_modules: options.TargetsFlag = None,
    quiet: options.QuietFlag = False,
    as_json: options.JsonOption = False,
) -> None:
    """Check everything that a run needs before any weight is loaded: data, labels, targets, memory, time."""
    set_up_logging("warning")
    words = [argument for argument in sys.argv[1:] if argument not in ("--json", "--quiet")]
    command = shlex.join(["philora", *("train" if word == "check" else word for word in words)])
    _check_run(config, [*(overrides or []), *options.flag_overrides(context)], command, as_json, quiet)


@add_command(GROUP_DATA, "data.md", "philora data support.csv", name="data")
def show_data(
    source: Annotated[
        str, typer.Argument(help="Data: a file, a folder or a hub id; or the YAML file of a run.", metavar="FILE")
    ],
    overrides: options.Overrides = None,
    as_json: options.JsonOption = False,
) -> None:
    """Describe a data source: shape, counts, lengths, languages, repeats, odd rows, e-mail addresses, labels."""
    set_up_logging("error")  # the findings below replace the notices
    from philora.dataset.describe import describe_data

    found = describe_data(source, overrides or [])
    if as_json:
        print_json(found.to_dict())
        return
    _show_sources(found.sources)
    for name, split in found.splits.items():
        counts = split.counts
        out.print(f"[bold]{name:<10}[/] {counts.rows:,} rows, {counts.duplicates:,} duplicates", highlight=False)
        out.print(f"           tokens of {escape(found.tokenizer)}: {split.tokens}", highlight=False)
        out.print(f"           tokens of answers: {split.answer_tokens}", highlight=False)
        out.print(f"           turns: {split.turns}", highlight=False)
        languages = ", ".join(f"{code} {share:.0%}" for code, share in split.languages.items())
        out.print(f"           languages: {languages}", highlight=False)
        if split.system_turns is not None:
            text, share = split.system_turns
            out.print(f"           system turn of {share:.0%}: {escape(text)}", highlight=False)
    among = "eval are nearly the same as one of train" if "eval" in found.splits else "train are nearly the same"
    out.print(f"[bold]repeats[/]    {found.near_duplicates:,} rows of {among}", highlight=False)
    for finding in found.findings:
        out.print(f"[yellow]found[/]      {escape(str(finding))}", highlight=False)
    for notice in found.notices:
        out.print(f"[yellow]notice[/]     {escape(notice)}")
    _show_labels(found.examples, "examples")


@add_command(GROUP_DATA, "configuration.md", "philora config support.yaml training_config.max_steps=50", name="config")
def show_config(
    config: options.ConfigArgument, overrides: options.Overrides = None, as_json: options.JsonOption = False
) -> None:
    """Show the effective configuration and where every value comes from."""
    from philora.configuration.config import load_config
    from philora.configuration.writing import explain

    settings, given, _ = choose(config, overrides or [])
    rows = list(explain(load_config(settings, given)))
    if as_json:
        shown = {key: {"value": value, "from": origin} for key, value, origin in rows}
        print(json.dumps(shown, ensure_ascii=False, indent=2, default=str))
        return
    table = Table("setting", "value", "from", box=None)
    for key, value, origin in rows:
        table.add_row(key, escape(json.dumps(value, ensure_ascii=False, default=str)), escape(origin))
    display.print_whole(out, table)


def _check_run(config: str, overrides: list[str], command: str, as_json: bool, quiet: bool) -> None:
    """Show what `check` found, and its verdict with the command that starts the run."""
    with err.status("checking"):
        from philora.training.readiness import preflight

        source, given, _ = choose(config, overrides)
        found = preflight(source, given)
    if as_json:
        print_json({**found.to_dict(), "verdict": found.verdict(command)})
        return
    if not quiet:
        _show_preflight(found)
    verdict = escape(found.verdict(command))
    out.print(f"[bold {'yellow' if found.problems else 'green'}]{verdict}[/]", highlight=False)


def _show_preflight(found: Preflight) -> None:
    """Show what a run would do, part by part."""
    out.print(f"[bold]model[/]      {escape(found.model)}")
    out.print(f"[bold]stops[/]      {escape(', '.join(found.stop_tokens))}   padding {escape(found.padding_token)}")
    out.print(f"[bold]device[/]     {escape(str(found.hardware))}")
    table = Table("data", "rows", "tokens", "labels", "longest", "truncated", "dropped", "duplicates", box=None)
    for name, figures in found.data.items():
        keys = ("rows", "tokens", "labels", "longest_tokens", "truncated", "dropped", "duplicates")
        table.add_row(name, *(f"{figures.get(key, 0):,}" for key in keys))
    display.print_whole(out, table)
    _show_sources(found.sources)
    for notice in found.notices:
        out.print(f"[yellow]notice[/]     {escape(notice)}")
    _show_labels([found.preview], "one example")
    out.print(f"\n[bold]what is trained[/]\n{escape(str(found.coverage))}", highlight=False)
    plan = Table("plan", "", box=None)
    for name, value in found.plan.rows():
        plan.add_row(name, escape(value))
    out.print()
    display.print_whole(out, plan)
    out.print()


def _show_sources(sources: dict[str, Any]) -> None:
    """Show which shape each source was read as, how that was recognised, and its first conversations."""
    for item in (source for some in sources.values() for source in some):
        out.print(f"[bold]read[/]       {escape(str(item))}", highlight=False)
        for example in item.examples:
            out.print(f"           [dim]{escape(example)}[/]", highlight=False)


def _show_labels(examples: Sequence[Sequence[tuple[str, bool]]], title: str) -> None:
    """Show examples with the tokens that the loss is on: coloured, or marked where there is no colour."""
    marks = display.labelled_text(out, ())[1]
    out.print(f"\n[bold]{title}; the loss is on {marks}[/]", highlight=False)
    for example in examples:
        out.print(display.labelled_text(out, example)[0])
