"""Show runs and answers in a notebook: tables, a curve, and a progress bar. Importing this does not need IPython."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from philora.reporting.formatting import duration

Point = tuple[float, float]

_WIDTH, _HEIGHT = 480, 160
_LEFT, _BOTTOM, _TOP = 44, 22, 8
_COLOURS = ("#3b6fb6", "#c2571a")


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    module = sys.modules.get("IPython")
    shell = None if module is None else module.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> Markup:
    """Return rows of text as an HTML table; every cell is escaped."""
    style = Markup('style="text-align:left;vertical-align:top"')
    names = Markup("").join(Markup("<th {}>{}</th>").format(style, name) for name in header)
    head = Markup("<tr>{}</tr>").format(names)
    body = (Markup("").join(Markup("<td {}>{}</td>").format(style, cell) for cell in row) for row in rows)
    lines = Markup("").join(Markup("<tr>{}</tr>").format(row) for row in body)
    return Markup("<table>{}{}</table>").format(head if header else "", lines)


def text_table(rows: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """Return rows of text as lines with aligned columns."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in shown)


def curve(lines: Mapping[str, Sequence[Point]]) -> Markup:
    """Return a chart of losses by step as SVG; empty if there are fewer than two points."""
    drawn = {name: points for name, points in lines.items() if points}
    every = [point for points in drawn.values() for point in points]
    if len(every) < 2:
        return Markup("")
    most_steps = max(step for step, _ in every) or 1
    low, high = min(value for _, value in every), max(value for _, value in every)
    height = (high - low) or 1.0

    def place(point: Point) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 4) * point[0] / most_steps
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - point[1]) / height
        return f"{x:.1f},{y:.1f}"

    parts = [
        Markup('<text x="{}" y="{}" text-anchor="end">{:.2f}</text>').format(_LEFT - 6, y, value)
        for y, value in ((_TOP + 8, high), (_HEIGHT - _BOTTOM, low))
    ]
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="end">step {:g}</text>').format(_WIDTH, _HEIGHT - 6, most_steps)
    )
    for index, (name, points) in enumerate(drawn.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        path = " ".join(map(place, points))
        parts.append(Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>').format(path, colour))
        x = _LEFT + 120 * index
        parts.append(Markup('<text x="{}" y="{}" style="fill:{}">{}</text>').format(x, _HEIGHT - 6, colour, name))
    return Markup(
        '<svg viewBox="0 0 {} {}" width="{}" role="img" aria-label="loss by step" '
        'style="font:11px sans-serif;fill:currentColor">{}</svg>'
    ).format(_WIDTH, _HEIGHT, _WIDTH, Markup("").join(parts))


class NotebookBar(TrainerCallback):  # type: ignore[misc]
    """Show a run's progress in one cell: a bar, the newest figures and the time left."""

    def __init__(self, found: Sequence[str] = ()) -> None:
        """Show what was found in the data, and the bar below it."""
        self._found = list(found)
        self._shown: Any = None
        self._figures: dict[str, str] = {}
        self._last: TrainerState | None = None
        self._began = (0, time.monotonic())
        self.show("loading the model; the base is evaluated first")

    def add(self, line: str) -> None:
        """Show a line above the bar from now on."""
        if line not in self._found:
            self._found.append(line)

    def show(self, text: str, done: int = 0, total: int = 0) -> None:
        """Show a bar, or a line of text alone while `total` is 0."""
        from IPython.display import HTML, display

        bar = Markup('<progress value="{}" max="{}" style="width:16em"></progress> ').format(done, total)
        above = Markup("").join(Markup("{}<br>").format(line) for line in self._found)
        html = HTML(Markup("<div>{}{}{}</div>").format(above, bar if total else "", text))  # type: ignore[no-untyped-call]
        if self._shown is None:
            self._shown = display(html, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._shown.update(html)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the bar at the first step of the run, or at the step it resumes from."""
        self._began = (state.global_step, time.monotonic())
        self._step(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        self._step(state)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Show the newest loss."""
        names = {"loss": "loss", "eval_loss": "held-out loss"}
        found = {name: f"{name} {float(logs[key]):.4f}" for key, name in names.items() if logs and key in logs}
        if found:
            self._figures |= found
            self._step(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show that the adapter is evaluated now."""
        self._last = state
        self.show("trained; the adapter is evaluated now", state.global_step, state.max_steps)

    def end(self) -> None:
        """Show the last figures."""
        if self._last is not None:
            self._step(self._last)

    def _step(self, state: TrainerState) -> None:
        first, began = self._began
        done = state.global_step - first
        text = f"step {state.global_step:,} of {state.max_steps:,}"
        if done > 0 and state.global_step < state.max_steps:
            left = (time.monotonic() - began) / done * (state.max_steps - state.global_step)
            text += f", {duration(left)} left"
        self.show(", ".join([text, *self._figures.values()]), state.global_step, state.max_steps)


class Notices(logging.Handler):
    """Show philora's warnings above the bar, without repeats."""

    def __init__(self, bar: NotebookBar) -> None:
        super().__init__(logging.WARNING)
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        """Add one record."""
        self._bar.add(f"notice: {record.getMessage()}")


def monospaced(text: str) -> str:
    """Return text as monospaced HTML."""
    return str(Markup("<pre>{}</pre>").format(escape(text)))


def block(text: str) -> str:
    """Return text as HTML that keeps its lines."""
    return str(Markup('<div style="white-space:pre-wrap">{}</div>').format(escape(text)))
