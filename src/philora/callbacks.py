"""What watches a run: the metrics file, and the signals that stop it in good order."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from philora import processes
from philora.errors import RunError, fault


def peak_memory_bytes() -> int:
    """Largest memory that this process has held: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends each log entry to `metrics.jsonl`, with tokens per second and memory; whole lines only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: tuple[float, float] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock; drop lines that a resumed run will write again."""
        self._last = (time.monotonic(), 0.0)
        if self.path.exists() and state.is_world_process_zero:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= state.global_step]
            if len(kept) != len(lines):
                self.path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Add throughput and memory to the entry, for whoever shows it next, and write it."""
        if logs is None or not state.is_world_process_zero:
            return
        now, tokens = time.monotonic(), float(logs.get("num_tokens", 0.0))
        if "loss" in logs and self._last is not None and tokens:
            seconds, count = now - self._last[0], tokens - self._last[1]
            if self._last[1] or state.global_step <= args.logging_steps:
                logs["tokens_per_second"] = round(count / max(seconds, 1e-9), 1)
        if "loss" in logs:
            self._last = (now, tokens)
        logs["memory_bytes"] = peak_memory_bytes()
        entry = {"step": state.global_step, "epoch": state.epoch, "time": round(time.time(), 3), **logs}
        self._append(json.dumps(entry, allow_nan=True, default=float) + "\n")

    def _append(self, line: str) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)
            expected = f"room to write to it: {error}"
            raise RunError(
                fault("run", "metrics", str(self.path), expected, "Free some space, then --resume")
            ) from error


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """SIGINT or SIGTERM: finish the step, save a checkpoint, stop. A second signal stops at once.

    `stopped_by` names the signal afterwards. Of several processes all stop after the same step, whichever of them the
    signal reached. Ctrl-C in a terminal reaches each of them twice, from the terminal and from the launcher, so with
    several a repeat within `REPEAT_SECONDS` is the same signal.
    """

    REPEAT_SECONDS = 5.0

    def __init__(self) -> None:
        self.stopped_by: str | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._received)
            except ValueError:  # not the main thread: signals are somebody else's there
                return self
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            if processes.count() > 1 and time.monotonic() - self._received_at < self.REPEAT_SECONDS:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received_at = time.monotonic()
        self.stopped_by = signal.Signals(number).name

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Ask the trainer to save and stop once a signal has come, to this process or to another."""
        number = processes.agreed(0 if self.stopped_by is None else int(signal.Signals[self.stopped_by]))
        if number and self.stopped_by is None:
            self.stopped_by = signal.Signals(number).name
        if self.stopped_by is not None:
            control.should_save = control.should_training_stop = True
        return control
