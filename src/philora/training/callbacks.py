"""Write the metrics file of a run, and watch for losses and gradients that are not finite or jump."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from philora.errors import RunError, fault
from philora.files.checkpoint import how_to_continue, sync_file, write_text


def peak_memory_bytes() -> int:
    """Return the peak memory of this process: allocated on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # Linux keeps ru_maxrss through exec, so a small run would show the peak of its parent process.
    peak = _peak_by_status(Path("/proc/self/status"))
    if peak is not None:
        return peak
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _peak_by_status(status: Path) -> int | None:
    """Return the peak in Linux's status file of a process; None where a container runtime leaves it out."""
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    except (OSError, ValueError, IndexError):
        return None


class MetricsFile(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Append each log entry to `metrics.jsonl`, with tokens per second and memory; only complete lines are written.

    A checkpoint stores the number of lines, so that a run that resumes from it writes each entry once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lines: int | None = None
        self.tokens = 0
        self.seconds = 0.0
        self._since = time.monotonic()

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        lines, seconds = 0, time.monotonic() - self._since
        if self.path.exists():
            sync_file(self.path)
            with self.path.open("rb") as file:
                lines = sum(1 for _ in file)
        attributes = {"lines": lines, "tokens": self.tokens, "seconds": seconds}
        return {"args": {"path": str(self.path)}, "attributes": attributes}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock, and remove lines that a resumed run will write again."""
        self._since = time.monotonic() - self.seconds
        if self.path.exists() and state.is_world_process_zero:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A checkpoint of an older release has no count: the step decides.
            old = [line for line in lines if _step_of(line) <= state.global_step]
            kept = old if self.lines is None else lines[: self.lines]
            if len(kept) != len(lines):
                write_text(self.path, "".join(kept))

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Add throughput and memory to the entry, which later callbacks show, and write it."""
        if logs is None or not state.is_world_process_zero:
            return
        if "loss" in logs and "num_tokens" in logs:
            now, tokens = time.monotonic(), int(logs["num_tokens"])
            logs["tokens_per_second"] = round((tokens - self.tokens) / max(now - self._since, 1e-9), 1)
            self._since, self.tokens = now, tokens
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
            expected = f"free space to write to it: {error}"
            todo = f"Free some space, then {how_to_continue(self.path.parent / 'checkpoints')}"
            raise RunError(fault("run", "metrics", str(self.path), expected, todo)) from error


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


SPIKE_WINDOW_STEPS, SPIKE_AFTER_STEPS = 50, 20


class StepWatch:
    """Check the loss and the gradient norm of every optimizer step; its counts are part of a checkpoint.

    A spike is a loss that is above 1.5 times the median of the last 50 finite losses, and more than 6 of their scaled
    median absolute deviations above it. The first 20 losses are not checked for spikes.

    Attributes:
        in_a_row: Non-finite steps since the last finite one.
        total: Non-finite steps of the run.
        spikes: Number of spikes.
    """

    def __init__(self) -> None:
        self.in_a_row = self.total = self.spikes = 0
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW_STEPS)
        self._jumped = False

    def finite(self, loss: float, gradient_norm: float) -> bool:
        """Return whether the step may be taken; count those that may not."""
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        self.total += 1
        return False

    def spike(self, loss: float) -> float | None:
        """Return the running median if a loss is the first of a spike; None if it is not."""
        jumps, median = False, math.nan
        if len(self._losses) >= SPIKE_AFTER_STEPS:
            median = statistics.median(self._losses)
            spread = 1.4826 * statistics.median(abs(loss - median) for loss in self._losses)
            jumps = loss > 1.5 * median and loss > median + 6 * spread
        self._losses.append(loss)
        begins, self._jumped = jumps and not self._jumped, jumps
        self.spikes += begins
        return median if begins else None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        counts = {"in_a_row": self.in_a_row, "total": self.total, "spikes": self.spikes}
        return {**counts, "losses": list(self._losses), "jumped": self._jumped}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue counting from what `state` returned."""
        self.in_a_row, self.total, self.spikes = (int(state.get(key, 0)) for key in ("in_a_row", "total", "spikes"))
        self._losses = deque(map(float, state.get("losses", ())), maxlen=SPIKE_WINDOW_STEPS)
        self._jumped = bool(state.get("jumped", False))
