"""Show a run and its commands on a terminal: log lines, progress, figures, the result.

The command line and `philora.train` in a script use these functions and so show the same.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from philora.errors import printable
from philora.runtime import processes

if TYPE_CHECKING:
    from philora.evaluation.measures import Paired
    from philora.reporting.progress import ProgressBar

ROOT = "philora"
"""Name of philora's root logger."""


class SafeConsole(Console):
    """A console without control characters in text, so that data, names and models cannot control the terminal."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Render without control characters."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class LogLines(logging.Handler):
    """Print log records as plain lines on a console; a warning is shown as a notice."""

    def __init__(self, console: Console, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.console = console
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record; a notice is shown once."""
        text = escape(record.getMessage())
        if record.levelno >= logging.WARNING:
            if text in self._shown:
                return
            self._shown.add(text)
        line = f"[yellow]notice:[/] {text}" if record.levelno >= logging.WARNING else text
        self.console.print(line, highlight=False)


def log_lines(console: Console, level: str) -> LogLines:
    """Return a handler that shows log lines from a level on; other processes than the first show errors only.

    The level is one of `training_config.log_level`; `passive` shows warnings.
    """
    chosen = logging.WARNING if level == "passive" else int(getattr(logging, level.upper()))
    return LogLines(console, chosen if processes.is_main() else logging.ERROR)


def ignore_future_warnings() -> None:
    """Hide warnings of transformers, TRL and PEFT about their own future releases."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(transformers|trl|peft|torch|accelerate)\b")


@contextlib.contextmanager
def shown(level: str) -> Iterator[ProgressBar]:
    """Show a run while it runs: its log lines and its progress, both on standard error.

    Log lines are not added where the command line, or a stream handler of the script, shows them already. The level is
    as for `log_lines`.

    Yields:
        The callback that shows the progress.
    """
    from philora.reporting.progress import ProgressBar, evaluation_shown

    logger = logging.getLogger(ROOT)
    before = logger.level
    lines = log_lines(SafeConsole(stderr=True, soft_wrap=True), level)
    handlers = [*logger.handlers, *logging.getLogger().handlers]
    if not any(type(handler) in (LogLines, logging.StreamHandler) for handler in handlers):
        logger.addHandler(lines)
        logger.setLevel(min(logging.INFO, lines.level))
    console = SafeConsole(stderr=True, soft_wrap=True)
    bar = ProgressBar(console)
    try:
        with evaluation_shown(console) if processes.is_main() else contextlib.nullcontext():
            yield bar
    finally:
        bar.close()
        if lines in logger.handlers:
            logger.removeHandler(lines)
            logger.setLevel(before)


def show_result(folder: Path, results: Mapping[str, Any]) -> None:
    """Show the result of a run, the content of its `results.json`: scores, a few answers, speed and files."""
    console = SafeConsole(soft_wrap=True)
    if results["before"] and results["after"]:
        _show_scores(console, results)
    for sample in results["samples"]:
        console.print()
        for message in sample["prompt"]:
            console.print(f"[bold]{escape(message['role'])}:[/] {escape(message['content'])}", highlight=False)
        console.print(f"  [dim]base:   [/] {escape(_short(sample['base']))}", highlight=False)
        mark = "[green]matches the reference[/]" if sample["adapter_matched"] else "[yellow]differs[/]"
        console.print(f"  [dim]adapter:[/] {escape(_short(sample['adapter']))}  {mark}", highlight=False)
    speed = results["throughput"]
    console.print()
    console.print(
        f"{speed['tokens']:,} tokens in {speed['seconds']:.0f} s ({speed['tokens_per_second']:,.0f} tokens/s), "
        f"peak memory {results['memory']['peak_bytes'] / 1e9:.1f} GB",
        highlight=False,
    )
    console.print(f"adapter: {folder / 'adapter'}\nreport:  {folder / 'report.html'}", highlight=False)
    console.print("\n[bold]next[/]", highlight=False)
    for what, command in next_steps(folder):
        console.print(f"  {what.ljust(8)} {escape(command)}", highlight=False)


def _show_scores(console: Console, results: Mapping[str, Any]) -> None:
    """Show the held-out figures with intervals; in three columns for a run that started from an adapter."""
    from philora.evaluation.measures import Paired
    from philora.evaluation.scores import Scores, compare_table, stage_table

    before, after = Scores.from_dict(results["before"]), Scores.from_dict(results["after"])
    if results["start"]:
        table = Table("", "base", "start", "result", "change from start", box=None)
        for stage in stage_table(before, Scores.from_dict(results["start"]), after):
            table.add_row(*stage)
        table.title, table.title_justify = "held-out data", "left"
        console.print()
        print_whole(console, table)
        compared = results.get("comparison_with_start") or []
        if compared:
            show_figures(console, "from the start", [Paired.from_dict(entry) for entry in compared])
        return
    compared = results.get("comparison") or []
    if compared:
        show_figures(console, "held-out data", [Paired.from_dict(entry) for entry in compared])
        return
    table = Table("", "base", "with adapter", "change", title="held-out data", title_justify="left", box=None)
    for row in compare_table(before, after):
        table.add_row(*row)
    console.print()
    print_whole(console, table)


def labelled_text(console: Console, tokens: Sequence[tuple[str, bool]]) -> tuple[Text, str]:
    """Return an example with the tokens that have a loss marked, and a description of the mark.

    On a console with colours the tokens are coloured, else they are between `>>` and `<<`.
    """
    coloured = console.color_system is not None and not console.no_color
    text = Text()
    for labelled, group in itertools.groupby(tokens, key=lambda token: token[1]):
        piece = "".join(part for part, _ in group)
        if coloured:
            text.append(piece, style="black on green" if labelled else "dim")
        else:
            text.append(f">>{piece}<<" if labelled else piece)
    return text, "the coloured tokens" if coloured else "the tokens between >> and <<"


def next_steps(folder: Path) -> list[tuple[str, str]]:
    """Return the next steps for a run that has ended, with their commands."""
    run = shlex.quote(str(folder))
    exported = shlex.quote(f"{folder}-ollama")
    return [
        ("talk", f"philora chat {run}"),
        ("compare", f"philora chat {run} --web    # base and adapter side by side, in the browser"),
        ("report", f"philora report {run} --open"),
        ("Ollama", f"philora export {run} --format ollama --dtype q8_0 --out {exported}"),
    ]


def show_figures(console: Console, title: str, figures: Sequence[Paired]) -> None:
    """Show base and adapter with the interval of their difference, and the number of rows on which each is better."""
    from philora.evaluation.scores import interval_of, shown_figure

    table = Table(title=title, title_justify="left", box=None)
    for name in ("", "base", "adapter", "change, 95%", "better/same/worse"):
        table.add_column(name, no_wrap=True)
    for figure in figures:
        colour = {"better": "green", "worse": "red", "unclear": "dim"}[figure.verdict]
        change = f"[{colour}]{escape(interval_of(figure))}[/]"
        counts = f"{figure.wins:,}/{figure.ties:,}/{figure.losses:,}"
        table.add_row(
            figure.title, shown_figure(figure.before, figure), shown_figure(figure.after, figure), change, counts
        )
    console.print()
    print_whole(console, table)


def print_whole(console: Console, table: Table) -> None:
    """Print a table in its full width even on a narrower terminal, so that no figure is cut."""
    options = console.options.update(max_width=1000)
    wide = max(console.width, table.__rich_measure__(console, options).maximum)
    # `print` takes no width beyond the console's.
    console.print(Segments(list(console.render(table, options.update(width=wide)))), crop=False, end="")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]}..."
