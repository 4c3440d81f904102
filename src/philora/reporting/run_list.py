"""List the runs of a folder with base, date, score and status, for `philora runs`."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any, NamedTuple

from philora.configuration.reader import read_yaml
from philora.errors import ConfigError, fault
from philora.files.checkpoint import LOCK_NAME, read_json, run_lock
from philora.models.run_folder import CONFIG_NAME, is_run
from philora.reporting.formatting import mapping


class RunSummary(NamedTuple):
    """A run as a row of the list.

    Attributes:
        name: Its folder, relative to the listed one.
        folder: Its folder.
        base: The base model as its configuration names it; empty if that cannot be read.
        date: When it ended, or when one of its files was last written; ISO 8601, in UTC.
        loss_before: Held-out loss of the base; None if nothing was held out or the run has not ended.
        loss: The same with the adapter.
        exact_match: Share of the answers that equal their reference, with the adapter.
        status: `done`, `running`, or `stopped after step N`.
    """

    name: str
    folder: Path
    base: str
    date: str
    loss_before: float | None
    loss: float | None
    exact_match: float | None
    status: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**self._asdict(), "folder": str(self.folder)}


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in a folder and in the folders directly below it, newest first.

    Raises:
        ConfigError: The folder does not exist.
    """
    if not folder.is_dir():
        raise ConfigError(fault("runs", "folder", str(folder), "a folder that holds runs", "Train one: philora train"))
    files = [file for depth in ("*", "*/*") for file in folder.glob(f"{depth}/{CONFIG_NAME}")]
    runs = [run for run in (folder, *(file.parent for file in files)) if is_run(run)]
    return sorted((summarise(run, folder) for run in runs), key=lambda run: run.date, reverse=True)


def summarise(run: Path, seen_from: Path | None = None) -> RunSummary:
    """Return a run as a row, named after its folder: relative to `seen_from`, if that is another one."""
    results = read_json(run / "results.json")
    before, after = (mapping(results.get(key)) for key in ("before", "after"))
    try:
        model = read_yaml(run / CONFIG_NAME).get("model")
    except ConfigError:
        model = None
    written = max(path.stat().st_mtime for path in run.iterdir())
    last = datetime.datetime.fromtimestamp(written, datetime.UTC).isoformat(timespec="seconds")
    return RunSummary(
        name=run.name if seen_from in (None, run) else run.relative_to(seen_from).as_posix(),
        folder=run,
        base=str(model.get("name_or_path", "nano")) if isinstance(model, dict) else "",
        date=str(results.get("finished") or last),
        loss_before=before.get("loss"),
        loss=after.get("loss"),
        exact_match=after.get("exact_match"),
        status="done" if results else status_of(run),
    )


def status_of(run: Path) -> str:
    """Return the status of a run without results: `running` if a process has its lock, or `stopped after step N`."""
    try:
        if (run / LOCK_NAME).is_file():
            with run_lock(run):
                pass
    except ConfigError:
        return "running"
    except OSError:  # on a read-only disk no run is running
        pass
    steps = [path.name.removeprefix("checkpoint-") for path in (run / "checkpoints").glob("checkpoint-*")]
    return f"stopped after step {max((int(step) for step in steps if step.isdecimal()), default=0)}"
