"""Define a run as an object: its results and losses, and the commands on a run as methods."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from philora.configuration.config import load_config
from philora.configuration.folders import unused_folder
from philora.configuration.sections import Config
from philora.errors import ConfigError, DataError, fault
from philora.evaluation.measures import Paired
from philora.evaluation.scores import Scores, interval_of, shown_figure
from philora.interface import notebook
from philora.interface.answers import AnsweringModel, quiet
from philora.models.run_folder import SystemTurn, TrainedRun, is_run, resume_command, run_of
from philora.reporting.formatting import duration
from philora.reporting.report import read_run, write_report
from philora.reporting.run_list import RunSummary, summarise

if TYPE_CHECKING:
    from philora.exporting.conversion import Exported
    from philora.exporting.merged_folder import MergeResult
    from philora.interface.functions import Evaluated
    from philora.reporting.pushing import Pushed


class Loss(NamedTuple):
    """A loss that was logged.

    Attributes:
        step: The optimizer step.
        loss: Mean cross-entropy over the labelled tokens, in nats.
    """

    step: int
    loss: float


class Sample(NamedTuple):
    """A held-out prompt with the answers of base and adapter.

    Attributes:
        prompt: The messages up to the assistant's turn.
        reference: The answer in the data.
        base: The base's answer.
        adapter: The adapter's answer.
        matched: Whether the adapter's answer equals the reference.
    """

    prompt: list[dict[str, Any]]
    reference: str
    base: str
    adapter: str
    matched: bool


class Run(AnsweringModel):
    """A run folder, with the commands on it as methods.

    `philora.train` returns a run, and `philora.load` opens one. The model is loaded with the first question and kept
    for the next one; `free` releases its memory.

    Attributes:
        folder: The run folder.
    """

    def __init__(self, folder: Path, results: dict[str, Any] | None = None, base: str | None = None) -> None:
        """Open a run folder without reading it.

        Args:
            folder: The run folder.
            results: Its results; default: read from `results.json` when they are needed.
            base: Folder or hub id of the base; default: as the run records it.
        """
        super().__init__(folder, base)
        self.folder = folder
        self._results = results

    # -- identity

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.folder.resolve().name

    @property
    def adapter(self) -> Path:
        """Return the folder of the trained adapter, in PEFT's format."""
        return self.folder / "adapter"

    @property
    def summary(self) -> RunSummary:
        """Return the run as a line of `philora.runs`: base, date, held-out loss, status."""
        return summarise(self.folder)

    @property
    def status(self) -> str:
        """Return `done`, `running`, or `stopped after step N`."""
        return self.summary.status

    @property
    def base(self) -> str:
        """Return the base model as the configuration names it."""
        return self.summary.base

    @property
    def config(self) -> Config:
        """Return the configuration of the run.

        Raises:
            ConfigError: It has a key or value that this release does not know.
        """
        return load_config(self.folder / "config.yaml")

    @property
    def system(self) -> SystemTurn | None:
        """Return the system prompt of nearly all training conversations, which new conversations get too."""
        return TrainedRun(self.folder).system

    # -- results

    @property
    def results(self) -> dict[str, Any]:
        """Return the content of `results.json`.

        Raises:
            DataError: The run has not ended.
        """
        if self._results is None:
            found = read_run(self.folder).results
            if not found:
                todo = f"Resume it: philora.train({str(self.folder)!r}, resume=True), or {resume_command(self.folder)}"
                raise DataError(fault(str(self.folder), "results.json", self.status, "a run that has ended", todo))
            self._results = found
        return self._results

    @property
    def before(self) -> Scores | None:
        """Return the scores of the base on the held-out rows; None if there are none."""
        return Scores.from_dict(self.results["before"]) if self.results["before"] else None

    @property
    def after(self) -> Scores | None:
        """Return the scores of the adapter on the held-out rows; None if there are none."""
        return Scores.from_dict(self.results["after"]) if self.results["after"] else None

    @property
    def comparison(self) -> list[Paired]:
        """Return figures of base and adapter on the same held-out rows, with the interval of their difference."""
        return [Paired.from_dict(figure) for figure in self.results["comparison"]]

    @property
    def samples(self) -> list[Sample]:
        """Return a few held-out prompts with the answers of base and adapter."""
        names = ("prompt", "reference", "base", "adapter", "adapter_matched")
        return [Sample(*(sample[name] for name in names)) for sample in self.results["samples"]]

    @property
    def losses(self) -> list[Loss]:
        """Return the logged training losses by step."""
        return self._series("loss")

    @property
    def held_out_losses(self) -> list[Loss]:
        """Return the losses on held-out rows during training, by step."""
        return self._series("eval_loss")

    def _series(self, key: str) -> list[Loss]:
        return [Loss(int(step), value) for step, value in read_run(self.folder).series(key)]

    # -- commands

    def evaluate(self, **options: Any) -> Evaluated:
        """Compare base and adapter on the held-out rows; options are those of `philora.evaluate`.

        The model that was kept for questions is freed first, because two copies may not fit.
        """
        from philora.interface.functions import evaluate

        self.free()
        return evaluate(self.folder, **({"base": self._base} | options))

    def report(self, out: str | Path | None = None) -> Path:
        """Write `report.html` again, with evaluations since then; return the file."""
        return write_report(self.folder, out=None if out is None else Path(out))

    def merge(self, out: str | Path | None = None, **options: Any) -> MergeResult:
        """Write a model folder with the adapter merged into the weights.

        Args:
            out: A new folder; default: `<run>-merged` beside the run, with a number if that exists.
            options: Options of `philora.merge_to_folder`.
        """
        from philora.exporting.merged_folder import merge_to_folder

        self.free()
        with quiet():
            return merge_to_folder(self.folder, self._beside("merged", out), **({"base": self._base} | options))

    def export(self, format: str = "peft", out: str | Path | None = None, **options: Any) -> Exported:
        """Write the adapter in another format, verified.

        Args:
            format: `peft`, `loralib`, `gguf` or `ollama`.
            out: A new folder; default: `<run>-<format>` beside the run, with a number if that exists.
            options: Options of `philora.export`.
        """
        from philora.exporting.conversion import export

        self.free()
        with quiet():
            return export(self.folder, self._beside(format, out), format=format, **({"base": self._base} | options))

    def push(self, repo_id: str, **options: Any) -> Pushed:
        """Push the adapter to the Hugging Face Hub; options are those of `philora.push`."""
        from philora.reporting.pushing import push

        with quiet():
            return push(self.folder, repo_id, **({"base": self._base} | options))

    def _beside(self, what: str, out: str | Path | None) -> Path:
        return unused_folder(self.folder.with_name(f"{self.folder.name}-{what}")) if out is None else Path(out)

    # -- display

    def _rows(self) -> list[tuple[str, str]]:
        summary = self.summary
        rows = [("run", str(self.folder)), ("base", summary.base), ("status", summary.status)]
        if summary.status != "done":
            return rows
        data, speed = self.results["data"], self.results["throughput"]
        counts = ", ".join(f"{data[split]['rows']:,} {split}" for split in ("train", "eval") if data.get(split))
        trained = f"{speed['steps']:,} steps, {speed['tokens']:,} tokens, {duration(speed['seconds'])}"
        rows += [("rows", counts), ("trained", trained)]
        rows += [
            (figure.title, f"{shown_figure(figure.before, figure)} → {shown_figure(figure.after, figure)} "
                           f"({interval_of(figure)})")
            for figure in self.comparison if not math.isnan(figure.before)
        ]  # fmt: skip
        return rows

    def __repr__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)

    def _repr_html_(self) -> str:
        lines = {"training loss": self.losses, "held-out loss": self.held_out_losses}
        return str(notebook.table(self._rows()) + notebook.curve(lines))


class RunTable(list[RunSummary]):
    """A list of runs, newest first, that is shown as a table."""

    def _cells(self) -> list[tuple[str, ...]]:
        def number(value: float | None) -> str:
            return "" if value is None else f"{value:.4f}"

        return [
            (run.name, run.base, run.date[:16].replace("T", " "), number(run.loss_before), number(run.loss), run.status)
            for run in self
        ]

    def __repr__(self) -> str:
        return notebook.text_table(self._cells(), _HEADER)

    def _repr_html_(self) -> str:
        return str(notebook.table(self._cells(), _HEADER))


_HEADER = ("run", "base", "date", "held-out loss, base", "with adapter", "status")


def load(folder: str | Path, *, base: str | None = None) -> Run:
    """Open an earlier run.

    Args:
        folder: The run folder, or the adapter in it.
        base: Folder or hub id of the base; default: as the run records it.

    Raises:
        ConfigError: The folder is not that of a run.

    Example:
        >>> run = load("runs/helpdesk")  # doctest: +SKIP
        >>> run.chat("How do I reset my password?")  # doctest: +SKIP
    """
    path = Path(folder).expanduser()
    found = path if is_run(path) else run_of(path) if path.is_dir() and path.name == "adapter" else None
    if found is None:
        expected = "the folder of a run, with config.yaml and the other files of a run"
        todo = "philora.runs() lists those in runs/; philora.chat and philora.generate take any adapter"
        raise ConfigError(fault("philora.load", "folder", str(folder), expected, todo))
    return Run(found, base=base)
