"""The progress bar of a run in a terminal: loss, tokens per second, time left, memory."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """Shows a run's progress on a console; prints one line a log entry where the console is no terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar at the step that the run begins or goes on from."""
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
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the newest figures."""
        if not logs or not state.is_world_process_zero:
            return
        parts = []
        for key, form in (
            ("loss", "loss {:.4f}"),
            ("eval_loss", "held-out loss {:.4f}"),
            ("learning_rate", "lr {:.2e}"),
            ("tokens_per_second", "{:,.0f} tokens/s"),
        ):
            if key in logs:
                parts.append(form.format(float(logs[key])))
        if "memory_bytes" in logs:
            parts.append(f"{float(logs['memory_bytes']) / 1e9:.1f} GB")
        figures = "  ".join(parts)
        if self._progress is not None and self._task is not None:
            if "loss" in logs:
                self._progress.update(self._task, figures=figures)
            elif "eval_loss" in logs:
                self.console.print(f"step {state.global_step}: {figures}")
        elif "loss" in logs or "eval_loss" in logs:
            self.console.print(f"step {state.global_step}/{state.max_steps}  {figures}", highlight=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; called on errors too."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
