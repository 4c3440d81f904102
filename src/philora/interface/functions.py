"""Define the commands as functions: the same choices, checks and files, with a result instead of printed lines."""

from __future__ import annotations

import contextlib
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from transformers import TrainerCallback

from philora.configuration.config import load_config
from philora.configuration.folders import unused_folder
from philora.configuration.sections import Config
from philora.errors import ConfigError, fault
from philora.evaluation.assessment import Assessment
from philora.evaluation.assessment import evaluate as assess
from philora.evaluation.scores import interval_of, shown_figure
from philora.exporting.conversion import Exported
from philora.exporting.conversion import export as convert
from philora.files.checkpoint import write_text
from philora.interface import notebook
from philora.interface.answers import Answer, AnsweringModel, Message, quiet
from philora.interface.choices import choose, overrides_of, refuse_other_overrides, stem
from philora.interface.run import Run, RunTable
from philora.models.run_folder import is_run
from philora.planning.starter import start
from philora.reporting import display
from philora.reporting.report import write_comparison, write_report
from philora.reporting.run_list import list_runs
from philora.runtime import processes
from philora.training.readiness import Preflight, preflight
from philora.training.run import train as run_training

Source = str | Path | Mapping[str, Any] | Config


class Settings(TypedDict, total=False):
    """The settings that people change most, as on the command line.

    Attributes:
        model: Base model: a hub id, a folder, or a short name such as `phi-3-mini`.
        evaluation: Held-out data: a file, a number of rows, or a share of the data such as 0.1.
        output: Run folder.
        epochs: Passes over the training data.
        learning_rate: Peak learning rate.
        batch_size: Rows of a micro-batch on every device.
        max_length: Longest row, in tokens.
        seed: Seed of the held-out split, the order of the data, dropout and the adapter's initial weights.
        rank: Rank of the adapter's matrices.
        alpha: The adapter's update is multiplied by alpha / rank.
        dropout: Dropout on the adapter's input.
        target_modules: Names of the linear layers to adapt, or `all-linear`.
    """

    model: str | Path | None
    evaluation: str | Path | float | None
    output: str | Path | None
    epochs: float | None
    learning_rate: float | str | None
    batch_size: int | str | None
    max_length: int | str | None
    seed: int | None
    rank: int | None
    alpha: float | None
    dropout: float | None
    target_modules: str | list[str] | None


def train(
    source: Source,
    overrides: Sequence[str] = (),
    *,
    resume: bool | str = False,
    callbacks: Sequence[TrainerCallback] = (),
    command: str | None = None,
    quiet: bool = False,
    **settings: Unpack[Settings],
) -> Run:
    """Fine-tune a model, show the progress, and return the run.

    A run on data, or by a mapping without `output_dir`, gets a new folder in `runs/`, with a number if the name exists,
    so that a notebook cell can run twice. A folder that is named is never overwritten.

    Args:
        source: A YAML file, a mapping of the same shape or a Config; or data: a file or folder of conversations. With
            `resume` the run folder.
        overrides: `KEY=VALUE` strings that replace settings of the source.
        resume: Resume from the newest complete checkpoint; "force" also when the configuration changed.
        callbacks: Further callbacks of transformers' Trainer.
        command: The command that the report shows; default: that of this process.
        quiet: Show warnings only. By default a terminal shows what `philora train` shows, a notebook a bar.
        settings: See `Settings`: `train("support.csv", model="phi-3-mini", epochs=2)`.

    Raises:
        ConfigError, DataError, ModelError, TargetError, AdapterError: An argument or its content is wrong; nothing
            has been written.
        Interrupted: A signal stopped the run; its progress is saved in a checkpoint.
        RunError: The run failed; files that exist in its folder are complete.
        Elsewhere: Another process of the run failed and reports the reason.

    Under torchrun or accelerate every process calls this. The first one writes, and all return the same result.
    """
    given = [*overrides, *overrides_of(settings)]
    config, found = processes.on_main(lambda: _configuration(source, given, resume))
    if not resume:
        _refuse_finished(config)
    in_notebook = notebook.in_notebook() and not quiet
    bar = notebook.NotebookBar(found) if in_notebook else None
    watching = callbacks if bar is None else [bar, *callbacks]
    with _noticed(bar, quiet):
        result = run_training(config, resume=resume, callbacks=watching, command=command, quiet=quiet or in_notebook)
    if bar is not None:
        bar.end()
    return Run(result.folder, result.results)


@contextlib.contextmanager
def _noticed(bar: notebook.NotebookBar | None, quiet: bool) -> Iterator[None]:
    """Show philora's warnings in the notebook or, in a quiet script without a log handler, as plain lines.

    A run adds a handler for its log file, which turns off Python's handler of last resort.
    """
    logger = logging.getLogger(display.ROOT)
    handler: logging.Handler | None = None if bar is None else notebook.Notices(bar)
    if handler is None and quiet and processes.is_main() and not (logger.handlers or logging.getLogger().handlers):
        handler = logging.StreamHandler()
        handler.setLevel(logging.WARNING)
    if handler is None:
        yield
        return
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _configuration(source: Source, overrides: list[str], resume: bool | str) -> tuple[Config, list[str]]:
    """Return the configuration of a run, and what was found in its data."""
    if isinstance(source, str | Path):
        chosen = choose(str(source), overrides, resume)
        return load_config(chosen.source, chosen.overrides), chosen.found
    config = load_config(source, overrides)
    if config.origins.get("training_config.output_dir", "default") != "default" or resume:
        return config, []
    folder = unused_folder(Path(config.training_config["output_dir"]).expanduser())
    return load_config(source, [*overrides, f"training_config.output_dir={folder}"]), []


def _refuse_finished(config: Config) -> None:
    folder = Path(config.training_config["output_dir"]).expanduser()
    try:
        finished = is_run(folder) and (folder / "adapter").is_dir() and (folder / "results.json").is_file()
    except (OSError, ValueError):  # not a valid name of a folder, which the run reports
        return
    if finished:
        expected = "a new or empty folder; this one holds another run"
        todo = f"Open it with philora.load({str(folder)!r}), or give another training_config.output_dir"
        raise ConfigError(fault(config.source, "training_config.output_dir", str(folder), expected, todo))


def demo(output: str | Path = "runs/demo", overrides: Sequence[str] = (), *, quiet: bool = False) -> Run:
    """Fine-tune the bundled model on the bundled help-desk chats; the folder gets a number if it exists."""
    folder = unused_folder(Path(output))
    return train("demo", overrides, output=folder, quiet=quiet)


def init(
    data: str | Path, overrides: Sequence[str] = (), *, model: str | None = None, out: str | Path | None = None
) -> Path:
    """Write a short configuration for data, and return its file.

    Args:
        data: A file, a folder or a hub id of conversations.
        overrides: `KEY=VALUE` strings for reading the data, such as `data.train.columns={...}`.
        model: Hub id, folder, or a name such as `phi-3-mini`; default: one that fits this machine.
        out: The file; default: named after the data.

    Raises:
        ConfigError: The file exists, or an override is wrong.
        DataError: The data cannot be read.
    """
    refuse_other_overrides(overrides)
    file = Path(out) if out is not None else Path(f"{stem(str(data))}.yaml")
    if file.exists():
        expected = "a file that does not exist yet"
        raise ConfigError(fault("init", "out", str(file), expected, "Give another with out, or remove this one"))
    write_text(file, start(str(data), model, overrides=overrides).text)
    return file


class Checked(Preflight):
    """The result of `check`, shown as its notices and verdict."""

    def __repr__(self) -> str:
        lines = [self.model, *(f"notice: {notice}" for notice in self.notices), str(self.coverage), str(self.plan)]
        return "\n".join([*lines, self.verdict("philora.train with the same arguments")])

    def _repr_html_(self) -> str:
        return notebook.monospaced(repr(self))


def check(source: Source, overrides: Sequence[str] = (), **settings: Unpack[Settings]) -> Checked:
    """Check all that a run needs before weights are loaded: data, labels, targets, memory, time.

    Args:
        source, overrides, settings: As for `train`.

    Raises:
        ConfigError, DataError, ModelError, TargetError, AdapterError, RunError: As `train` raises them.
    """
    config, _ = _configuration(source, [*overrides, *overrides_of(settings)], False)
    with quiet():
        found = preflight(config)
    return Checked(**vars(found))


class Evaluated(Assessment):
    """The result of an evaluation, shown as a table of figures."""

    def _lines(self) -> list[tuple[str, ...]]:
        return [
            (figure.title, shown_figure(figure.before, figure), shown_figure(figure.after, figure), interval_of(figure),
             f"{figure.wins:,}/{figure.ties:,}/{figure.losses:,}")
            for figure in (*self.figures, *self.forgetting)
        ]  # fmt: skip

    def __repr__(self) -> str:
        return notebook.text_table(self._lines(), _FIGURES)

    def _repr_html_(self) -> str:
        return str(notebook.table(self._lines(), _FIGURES))


_FIGURES = ("", "base", "adapter", "change, 95%", "better/same/worse")


def evaluate(source: str | Path | Run, **options: Any) -> Evaluated:
    """Compare base and adapter on the same held-out rows.

    Args:
        source: A run, its folder, a checkpoint, an adapter folder or a hub id.
        options: `data`, `base`, `generation`, `answers`, `limit`, `metrics`, `judge`, `forgetting`,
            `keep_training_rows`, `out` and `command`; see `philora.evaluation.assessment.evaluate`.

    Raises:
        AdapterError, ModelError: There is no adapter, or its base cannot be loaded.
        DataError: There is no row to score, or records cannot be used.
        ConfigError: A measure is unknown or its package missing, or `out` is missing or not a folder to write to.
        RunError: The judge failed.
    """
    folder = _folder(source)
    with quiet():
        found = assess(folder, **({"command": shlex.join(["philora", "evaluate", str(folder)])} | options))
    return Evaluated(**vars(found))


def chat(source: str | Path, text: str, *, base: str | None = None, **options: Any) -> Answer:
    """Ask an adapter a single question; `philora.load(RUN).chat(...)` keeps the model loaded for several.

    Args:
        source: A run folder, a checkpoint, an adapter folder or a hub id.
        text: The question.
        base: Base model; default: the one that the adapter names.
        options: Options of `Run.chat`.

    Raises:
        AdapterError, ModelError, ConfigError, DataError: As `Run.chat`.
    """
    return AnsweringModel(source, base).chat(text, **options)


def generate(
    source: str | Path,
    prompts: str | Path | Sequence[str | Sequence[Message]],
    *,
    base: str | None = None,
    **options: Any,
) -> list[Answer]:
    """Answer prompts in batches.

    Args:
        source: A run folder, a checkpoint, an adapter folder or a hub id.
        prompts: As for `Run.generate`.
        base: Base model; default: the one that the adapter names.
        options: Options of `Run.generate`.

    Raises:
        AdapterError, ModelError, ConfigError, DataError: As `Run.generate`.
    """
    return AnsweringModel(source, base).generate(prompts, **options)


def report(*runs: str | Path | Run, out: str | Path | None = None) -> Path:
    """Write the page of a run again, or one page that compares several; return the file.

    Args:
        runs: Runs or their folders.
        out: The file; default: `report.html` in the run folder, or `comparison.html` here.

    Raises:
        ConfigError: There are too few runs, or too many to compare.
        DataError: A folder is not that of a run.
    """
    folders = [Path(_folder(run)) for run in runs]
    if len(folders) == 1:
        return write_report(folders[0], out=None if out is None else Path(out))
    return write_comparison(folders, Path(out or "comparison.html"))


def runs(folder: str | Path = "runs") -> RunTable:
    """List the runs in a folder, newest first.

    Raises:
        ConfigError: The folder does not exist.
    """
    return RunTable(list_runs(Path(folder).expanduser()))


def import_adapter(
    source: str | Path, out: str | Path, *, base: str | None = None, lora_alpha: float | None = None
) -> Exported:
    """Read an adapter of another tool, and write it in PEFT's format, verified.

    Args:
        source: A file of loralib's, an adapter folder or a hub id.
        out: The folder to write; it must be new or empty.
        base: Folder or hub id of the base; default: the one that the adapter names.
        lora_alpha: Alpha of a loralib file without `lora.json` beside it.

    Raises:
        AdapterError, ConfigError, ModelError: As `philora.export`.
    """
    with quiet():
        return convert(source, out, format="peft", layout="fused", base=base, lora_alpha=lora_alpha)


def _folder(run: str | Path | Run) -> str | Path:
    return run.folder if isinstance(run, Run) else run
