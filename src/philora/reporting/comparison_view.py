"""Prepare the page of several runs: texts and coordinates for the template."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from philora.evaluation.measures import Paired
from philora.evaluation.scores import METRICS, change_of, ends_of, shown_figure
from philora.reporting.answers import compared_answers
from philora.reporting.charts import Axis, Curve, chart, smoothing_span
from philora.reporting.formatting import count, duration, mapping, number, real, short_count, without_secrets
from philora.reporting.run_record import Run


class Cell(NamedTuple):
    """A figure of one run.

    Attributes:
        text: The formatted value.
        interval: The 95% interval of its change from the base; empty if it has none.
        best: Whether no other run has a better value.
    """

    text: str
    interval: str = ""
    best: bool = False


def comparison_view(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the formatted content of the page of several runs."""
    names = _distinct_names(runs)
    styles = [f"run-{index}" for index in range(len(runs))]
    rows = [(title, cells) for title, cells in _compared(runs) if any(cell.text != "–" for cell in cells)]
    commands = [
        (name, without_secrets(str(run.results.get("command") or ""))) for name, run in zip(names, runs, strict=True)
    ]
    return {
        "names": list(zip(names, styles, strict=True)),
        "states": [(name, run.status) for name, run in zip(names, runs, strict=True) if not run.results],
        "rows": rows,
        "intervals": any(cell.interval for _, cells in rows for cell in cells),
        "charts": _charts(runs, names, styles),
        "settings": _differing(runs),
        "answers": compared_answers(runs, names),
        "commands": [(name, command) for name, command in commands if command],
        "philora": str(next((run.results["philora"] for run in runs if run.results.get("philora")), "")),
    }


def _charts(runs: Sequence[Run], names: Sequence[str], styles: Sequence[str]) -> list[dict[str, Any]]:
    """Return the charts over the same range of steps, with a curve of every run that logged the value."""
    axis = Axis(0.0, max(run.last_step() for run in runs))
    charts = []
    for title, key, form, short_form in (
        ("Loss on held-out data", "eval_loss", number, number),
        ("Training loss", "loss", number, number),
        ("Gradient norm", "grad_norm", number, number),
        ("Tokens per second", "tokens_per_second", count, short_count),
    ):
        curves = []
        for run, name, style in zip(runs, names, styles, strict=True):
            points = run.held_out_losses() if key == "eval_loss" else run.series(key)
            span = 0.0 if key == "eval_loss" else smoothing_span(points)
            curves.append(Curve(name, style, points, dots=not span and len(points) <= 40, span=span))
        title = f"{title}, smoothed" if any(curve.span for curve in curves) else title
        from_zero = key not in ("loss", "eval_loss")
        drawn = chart(title, curves, axis, form=form, short_form=short_form, from_zero=from_zero)
        if drawn is not None:
            charts.append(drawn)
    return charts


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """Return folder names, with as many parent folders as make them distinct."""
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(len(path) for path in paths) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({index + 1})" for index, run in enumerate(runs)]


def _compared(runs: Sequence[Run]) -> list[tuple[str, list[Cell]]]:
    """Return a row for every figure of the runs, the loss and the score first, with the best value marked."""
    titles = {metric.field: metric.title for metric in METRICS}
    titles |= {figure.field: figure.title for run in runs for figure in run.figures()}
    first = [name for name in ("loss", "exact_match") if name in titles]
    order = [*first, *(name for name in titles if name not in first)]
    rows = [(titles[name], _with_best([_figure(run, name) for run in runs])) for name in order]

    bases = [str(mapping(run.results.get("model")).get("name") or "–") for run in runs]
    losses = [run.series("loss") for run in runs]
    rows += [
        ("Loss of the base", [_figure(run, "loss", "before")[0] for run in runs]),
        ("Base model", list(map(Cell, bases))),
        ("Last training loss", [_cell(points[-1][1] if points else None, number) for points in losses]),
    ]
    for title, section, key, form in _RESULTS:
        found = [real(mapping(run.results.get(section)).get(key)) for run in runs]
        rows.append((title, [_cell(value, form) for value in found]))
    return rows


def _figure(run: Run, name: str, which: str = "after") -> tuple[Cell, float | None, bool]:
    """Return a figure of a run, its value, and whether a higher value is better."""
    for figure in run.figures():
        if figure.field == name:
            value: float = getattr(figure, which)
            interval = _interval(figure) if which == "after" else ""
            return Cell(shown_figure(value, figure), interval), real(value), figure.higher_is_better
    metric = next((metric for metric in METRICS if metric.field == name), None)
    found = real(mapping(run.results.get(which)).get(name))
    if metric is None or found is None:
        return Cell("–"), None, True
    return Cell(shown_figure(found, metric)), found, metric.higher_is_better


def _interval(figure: Paired) -> str:
    """Return the change from the base with its 95% interval."""
    ends = ends_of(figure)
    return f"{change_of(figure)} ({ends})" if ends else change_of(figure)


def _with_best(found: Sequence[tuple[Cell, float | None, bool]]) -> list[Cell]:
    """Return the cells of a figure, with the best one marked if they differ."""
    values = [value for _, value, _ in found if value is not None]
    if len(values) < 2 or min(values) == max(values):
        return [cell for cell, _, _ in found]
    best = max(values) if found[0][2] else min(values)
    return [cell._replace(best=value == best) for cell, value, _ in found]


def _cell(value: float | None, form: Callable[[float], str]) -> Cell:
    return Cell("–" if value is None else form(value))


# The numbers of `results.json` that are compared besides the scores: title, section, key, form.
_RESULTS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("Steps", "throughput", "steps", count),
    ("Tokens per second", "throughput", "tokens_per_second", count),
    ("Training time", "throughput", "seconds", duration),
    ("Peak memory", "memory", "peak_bytes", lambda value: f"{value / 1e9:.1f} GB"),
    ("Trained parameters", "coverage", "trainable_parameters", short_count),
)


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between runs, without their output folders and names."""
    settings = [_flat(yaml.safe_load(without_secrets(run.config)) or {}) for run in runs]
    left_out = {"training_config.output_dir", "training_config.run_name"}
    found = []
    for key in sorted({key for flat in settings for key in flat} - left_out):
        values = [flat.get(key, "–") for flat in settings]
        if len(set(values)) > 1:
            found.append((key, values))
    return found


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Return nested settings as `section.name: text`."""
    if isinstance(value, Mapping) and value:
        parts = (_flat(inner, f"{key}.{part}" if key else str(part)) for part, inner in value.items())
        return {name: text for part in parts for name, text in part.items()}
    return {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}
