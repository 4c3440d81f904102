"""Read the files of a run folder for the report.

A file that does not exist counts as empty, so that a stopped or running run can be shown too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from philora.configuration.run_paths import RECORD_NAME
from philora.errors import DataError, fault
from philora.evaluation.measures import Paired
from philora.files.checkpoint import read_json_lines
from philora.reporting.formatting import mapping, real
from philora.reporting.run_list import status_of

Point = tuple[float, float]

ANSWERS_NAME = "answers.jsonl"
"""Every held-out question of a run with both answers, one JSON object a line."""


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    Attributes:
        folder: The run folder.
        config: The text of `config.yaml`; empty if there is none.
        metrics: The entries of `metrics.jsonl` in order of their step.
        results: `results.json`; empty for a run that has not ended.
        evaluation: `evaluation/results.json` of `philora evaluate`; empty if it has not been called.
        state: `trainer_state.json`; empty for a run that has not ended.
        answers: Held-out questions with the answers of base and adapter, of the newest evaluation that has any.
        status: `done`, `running`, or `stopped after step N`.
        record: What `run.json` holds of the run's beginning.
    """

    folder: Path
    config: str
    metrics: list[dict[str, Any]]
    results: dict[str, Any]
    evaluation: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    status: str = "done"
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.folder.resolve().name

    def series(self, key: str) -> list[Point]:
        """Return (step, value) of every entry with a finite number under `key`; of equal steps the last one."""
        points = {}
        for entry in self.metrics:
            value = real(entry.get(key))
            if value is not None:
                points[float(entry["step"])] = value
        return sorted(points.items())

    def held_out_losses(self) -> list[Point]:
        """Return the held-out loss by step, with step 0 if the loss before training is known."""
        points = self.series("eval_loss")
        begins_with = mapping(self.results.get("start") or self.results.get("before"))
        first = real(begins_with.get("loss") or self.record.get("first_loss"))
        return points if first is None or not self.metrics else [(0.0, first), *(point for point in points if point[0])]

    def last_step(self) -> float:
        """Return the last logged step; 0 if there is none."""
        return max((float(entry["step"]) for entry in self.metrics), default=0.0)

    def settings(self) -> Mapping[str, Any]:
        """Return the configuration as values; empty if it cannot be read."""
        try:
            return mapping(yaml.safe_load(self.config))
        except yaml.YAMLError:
            return {}

    def kept_step(self) -> tuple[int, str] | None:
        """Return the step whose weights are the result, and whether it is the `best` or the `last`."""
        training = mapping(self.settings().get("training_config"))
        best, last = (real(self.state.get(key)) for key in ("best_global_step", "global_step"))
        if training.get("load_best_model_at_end") and best:
            return int(best), "best"
        return (int(last), "last") if last else None

    def figures(self) -> list[Paired]:
        """Return the newest figures with intervals: those of `philora evaluate` if it has been called."""
        return paired_figures(self.evaluation.get("comparison")) or paired_figures(self.results.get("comparison"))


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: The folder is not that of a run, or a file is not what philora wrote.
    """
    names = ("config.yaml", "metrics.jsonl", "results.json")
    if not any((folder / name).is_file() for name in names):
        expected = f"a run folder, with {', '.join(names)}"
        raise DataError(fault("report", "run", str(folder), expected, "Give the folder that `philora train` wrote"))
    metrics = [entry for entry in read_json_lines(folder / "metrics.jsonl") if real(entry.get("step")) is not None]
    results = _json_object(folder / "results.json")
    evaluation = _of_the_run(_json_object(folder / "evaluation" / "results.json"))
    return Run(
        folder,
        _text(folder / "config.yaml"),
        sorted(metrics, key=lambda entry: float(entry["step"])),
        results,
        evaluation,
        _json_object(folder / "trainer_state.json"),
        (_evaluated_answers(folder) if evaluation else [])
        or read_json_lines(folder / ANSWERS_NAME)
        or [sample for sample in results.get("samples") or [] if isinstance(sample, dict)],
        "done" if results else status_of(folder),
        _json_object(folder / RECORD_NAME),
    )


def paired_figures(entries: Any) -> list[Paired]:
    """Return the figures with intervals in `results.json`, without incomplete entries."""
    found = []
    for entry in entries or []:
        try:
            found.append(Paired.from_dict(entry))
        except (TypeError, AttributeError):
            continue
    return found


def _evaluated_answers(folder: Path) -> list[dict[str, Any]]:
    """Return the answers of `philora evaluate`, in the form of a run's own."""
    found = []
    for entry in read_json_lines(folder / "evaluation" / "examples.jsonl"):
        sides = {name: mapping(entry.get(name)) for name in ("base", "adapter")}
        if "prompt" in entry and "answer" in sides["adapter"]:
            answers = {name: side.get("answer") for name, side in sides.items()}
            matched = {f"{name}_matched": bool(side.get("exact_match")) for name, side in sides.items()}
            found.append({"prompt": entry["prompt"], "reference": entry.get("reference"), **answers, **matched})
    return found


def _of_the_run(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation of the run's adapter; leave out one of a checkpoint, which older releases stored here."""
    adapter = str(evaluation.get("adapter") or evaluation.get("source") or "")
    return {} if re.fullmatch(r"checkpoint-\d+", re.split(r"[/\\]", adapter.rstrip("/\\"))[-1]) else evaluation


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path) or "{}")
    except json.JSONDecodeError as error:
        content = str(error)
    if not isinstance(content, dict):
        raise DataError(fault(str(path), "content", content, "a JSON object as philora writes it"))
    return content
