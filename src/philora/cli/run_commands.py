"""Define the commands that train and evaluate: demo, train, evaluate, report, runs."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from philora.cli import options
from philora.cli.application import GROUP_RUN, add_command, err, out, print_json, set_up_logging
from philora.interface.choices import choose
from philora.reporting import display
from philora.runtime import process_state, processes
from philora.runtime.signals import StopOnSignal


@add_command(GROUP_RUN, "quickstart.md", "philora demo training_config.max_steps=60")
def demo(
    output: Annotated[
        str, typer.Option("--out", help="Run folder. A number is added where it exists already.")
    ] = "runs/demo",
    overrides: options.Overrides = None,
    as_json: options.JsonOption = False,
) -> None:
    """Fine-tune the bundled nano model on the bundled help-desk chats: a complete run in a few minutes."""
    from philora.configuration.folders import unused_folder

    folder = unused_folder(Path(output))
    train_run("demo", [f"training_config.output_dir={folder}", *(overrides or [])], False, as_json)


@add_command(GROUP_RUN, "quickstart.md", "philora train support.yaml --learning-rate 1e-4")
def train(
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
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            help="Resume the run from its newest complete checkpoint; --resume=force also if settings have changed.",
        ),
    ] = "",
    quiet: options.QuietFlag = False,
    as_json: options.JsonOption = False,
) -> None:
    """Fine-tune a model by a configuration, or on data alone; write a run folder with adapter and report."""
    if resume not in ("", "yes", "force"):
        raise typer.BadParameter(f"{resume!r}: expected --resume or --resume=force")
    given = [*(overrides or []), *options.flag_overrides(context)]
    train_run(config, given, "force" if resume == "force" else bool(resume), as_json, quiet)


@add_command(GROUP_RUN, "evaluation.md", "philora evaluate runs/support --answers 100", name="evaluate")
def evaluate_adapter(
    source: options.AdapterArgument,
    data: options.EvaluationDataOption = None,
    base: options.BaseOption = None,
    answers: options.AnswersOption = None,
    limit: options.LimitOption = None,
    metrics: options.MetricsOption = None,
    judge: options.JudgeOption = None,
    forgetting: options.ForgettingOption = True,
    keep_training_rows: options.KeepTrainingRowsOption = False,
    max_new_tokens: options.AnswerLengthOption = None,
    batch_size: options.AnswerBatchOption = None,
    sample: options.SampleOption = False,
    temperature: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    seed: options.SeedOption = 0,
    output: options.EvaluationFolderOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Compare an adapter with its base on held-out rows: loss, answers, ROUGE, BLEU, chrF, forgetting."""
    set_up_logging("warning" if as_json else "info")
    from philora.evaluation.assessment import evaluate
    from philora.reporting.progress import evaluation_shown

    changed: dict[str, float | None] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
    changed |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    with process_state.quiet_libraries(), evaluation_shown(err):
        found = evaluate(
            source,
            data=data,
            base=base,
            generation={"do_sample": sample, "seed": seed} | {k: v for k, v in changed.items() if v is not None},
            answers=answers,
            limit=limit,
            metrics=None if metrics is None else [part.strip() for part in metrics.split(",") if part.strip()],
            judge=judge,
            forgetting=forgetting,
            keep_training_rows=keep_training_rows,
            out=output,
            command=shlex.join(["philora", *sys.argv[1:]]),
        )
    if as_json:
        print_json(found.results)
        return
    for title, figures in (("held-out data", found.figures), ("general prompts and texts", found.forgetting)):
        if figures:
            display.show_figures(out, title, figures)
    out.print(
        f"\nresults: {found.folder / 'results.json'}\nby row:  {found.folder / 'examples.jsonl'}", highlight=False
    )


@add_command(GROUP_RUN, "evaluation.md", "philora report runs/first runs/second --open")
def report(
    runs: Annotated[
        list[str], typer.Argument(help="Run folder. With several, one page compares them.", metavar="RUN...")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="HTML file to write. Default: report.html in the run folder; of several runs, comparison.html here.",
        ),
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Write the HTML report of a run again, or one page that compares several runs."""
    from philora.reporting.report import write_comparison, write_report

    if len(runs) == 1:
        written = write_report(Path(runs[0]), out=Path(output) if output else None)
    else:
        written = write_comparison([Path(run) for run in runs], Path(output or "comparison.html"))
    if open_it and not webbrowser.open(written.absolute().as_uri()):
        err.print("[yellow]notice:[/] no browser was found: open the file yourself", highlight=False)
    if as_json:
        print_json({"report": str(written)})
        return
    out.print(str(written), highlight=False)


@add_command(GROUP_RUN, "commands.md", "philora runs", name="runs")
def show_runs(
    folder: Annotated[str, typer.Argument(help="Folder that contains run folders.", metavar="FOLDER")] = "runs",
    as_json: options.JsonOption = False,
) -> None:
    """List the runs in a folder, newest first: base, date, held-out loss, matching answers, status."""
    from philora.reporting.run_list import list_runs

    found = list_runs(Path(folder).expanduser())
    if as_json:
        print_json({"runs": [item.to_dict() for item in found]})
        return
    table = Table(box=None)
    for name in ("run", "base", "date", "held-out loss", "exact match", "status"):
        table.add_column(name, no_wrap=True)
    for item in found:
        loss = "" if item.loss is None else f"{item.loss:.4f}"
        loss = loss if item.loss_before is None else f"{item.loss_before:.4f} → {loss}"
        matches = "" if item.exact_match is None else f"{100 * item.exact_match:.1f}%"
        table.add_row(
            escape(item.name), escape(item.base), item.date[:16].replace("T", " "), loss, matches, item.status
        )
    if not found:
        out.print(f"no runs in {folder}", highlight=False)
        return
    display.print_whole(out, table)


def train_run(source: str, overrides: list[str], resume: bool | str, as_json: bool, quiet: bool = False) -> None:
    """Train with a configuration or on data alone, and show the progress."""
    from philora.configuration.config import load_config

    set_up_logging("info")
    settings, given, said = processes.on_main(lambda: choose(source, overrides, resume))
    config = load_config(settings, given)
    set_up_logging("warning" if quiet else str(config.training_config.get("log_level", "info")))
    for item in said:
        logging.getLogger("philora.run").info("%s", item)
    command = shlex.join(processes.command(sys.argv[1:]))
    if source == "demo":
        command = shlex.join(processes.command(["train", "demo", *overrides]))  # with the folder chosen by `demo`
    with (
        StopOnSignal("while loading", command),
        err.status("loading") if processes.is_main() else contextlib.nullcontext(),
    ):
        from philora.reporting.progress import ProgressBar
        from philora.training.run import train as run_training
    if not as_json:
        run_training(config, resume=resume, command=command, quiet=quiet)
        return
    bar = ProgressBar(err)
    try:
        result = run_training(config, resume=resume, callbacks=[bar], command=command, quiet=True)
    finally:
        bar.close()
    if processes.is_main():
        print_json({"folder": str(result.folder), "adapter": str(result.adapter), **result.results})
