"""Show the progress of a run in a terminal: loss, tokens per second, time left, memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from philora.generation.progress import listening
from philora.reporting.formatting import duration

FIGURES = {
    "loss": "loss {:.4f}", "eval_loss": "held-out loss {:.4f}", "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
}  # fmt: skip
"""The figures of a log entry that are shown."""


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Show a run's progress on a console: a bar on a terminal, otherwise a line for every log entry."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began: tuple[float, int] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar at the first step of the run, or at the step it resumes from."""
        self._began = (time.monotonic(), state.global_step)
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[dim]steps"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("[dim]left"),
            console=self.console,
        )
        self._progress.start()
        self._task = self._progress.add_task("training", total=state.max_steps, completed=state.global_step, figures="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Show the newest figures."""
        if not logs or not state.is_world_process_zero:
            return
        parts = [form.format(float(logs[key])) for key, form in FIGURES.items() if key in logs]
        if "memory_bytes" in logs:
            parts.append(f"{float(logs['memory_bytes']) / 1e9:.1f} GB")
        figures = "  ".join(parts)
        if self._progress is not None and self._task is not None:
            if "loss" in logs:
                self._progress.update(self._task, figures=figures)
            elif "eval_loss" in logs:
                self.console.print(f"step {state.global_step}: {figures}")
        elif "loss" in logs or "eval_loss" in logs:
            left = self._left(state)
            self.console.print(f"step {state.global_step}/{state.max_steps}  {figures}{left}", highlight=False)

    def _left(self, state: TrainerState) -> str:
        """Return the time that the remaining steps take at the pace so far."""
        if self._began is None or state.global_step <= self._began[1] or state.global_step >= state.max_steps:
            return ""
        pace = (time.monotonic() - self._began[0]) / (state.global_step - self._began[1])
        return f"  {duration(pace * (state.max_steps - state.global_step))} left"

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar; called on errors too."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


LINE_SECONDS = 20.0
"""Time between two lines on the progress of an evaluation without a terminal."""


class EvaluationProgress:
    """Show the progress of scoring and generation: a bar on a terminal, otherwise a line every `LINE_SECONDS`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._line = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Update the display: `done` of `total` are done."""
        now = time.monotonic()
        if not self._began:
            self._line = now  # the first line comes after the time between two lines
        began, counted = self._began.setdefault(what, (now, done))
        if self.console.is_terminal:
            self._advance(what, done, total)
        elif now - self._line >= LINE_SECONDS and done < total:
            self._line = now
            left = f", {duration((now - began) / (done - counted) * (total - done))} left" if done > counted else ""
            self.console.print(f"{what}: {done:,} of {total:,}{left}", highlight=False)
        if done >= total:
            del self._began[what]

    def _advance(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
            self._bar = Progress(
                *columns, TimeRemainingColumn(), TextColumn("[dim]left"), console=self.console, transient=True
            )
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, total=total)
        if done >= total:
            self._bar.remove_task(self._tasks.pop(what))
            if not self._tasks:
                self.close()

    def close(self) -> None:
        """Remove the bar; called on errors too."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}


@contextlib.contextmanager
def evaluation_shown(console: Console) -> Iterator[None]:
    """Show the progress of scoring and generation within the block."""
    shown = EvaluationProgress(console)
    try:
        with listening(shown):
            yield
    finally:
        shown.close()
