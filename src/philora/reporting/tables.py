"""Prepare the tables of base and adapter: figures, changes with intervals, and the rows on which each is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from philora.evaluation.measures import EXACT_MATCH, LOSS, Paired
from philora.evaluation.scores import METRICS, Scores, better, change_of, compare_table, ends_of, shown_figure
from philora.reporting.formatting import mapping, real
from philora.reporting.run_record import Run, paired_figures


def before_and_after(run: Run) -> list[dict[str, Any]]:
    """Return the table of a run: the loss and the score first, then the other figures."""
    start = mapping(run.results.get("start"))
    before, after = (mapping(run.results.get(key)) for key in ("before", "after"))
    if start:
        return _first_the_judging(_stage_rows(run, before, start, after))
    if figures := run.figures():
        return _first_the_judging(paired_rows(figures))
    return _first_the_judging(_plain_rows(before, after)) if before or after else []


def paired_rows(figures: Sequence[Paired]) -> list[dict[str, Any]]:
    """Return rows with the interval of every change, and how often the adapter is better, equal or worse."""
    rows = []
    for figure in figures:
        known = math.isfinite(figure.before) and math.isfinite(figure.after)
        rows.append(
            {
                "metric": figure.title,
                "before": shown_figure(figure.before, figure),
                "after": shown_figure(figure.after, figure),
                "change": change_of(figure),
                "interval": ends_of(figure),
                "direction": "" if figure.verdict == "unclear" else figure.verdict,
                "track": [100 * figure.before, 100 * figure.after] if figure.percent and known else None,
                "counts": [figure.wins, figure.ties, figure.losses],
            }
        )
    return rows


def _first_the_judging(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    first = [LOSS.title, EXACT_MATCH.title]
    return sorted(rows, key=lambda row: first.index(row["metric"]) if row["metric"] in first else len(first))


def _plain_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return rows without intervals, for runs of older releases."""
    by_title = {metric.title: metric for metric in METRICS}
    rows = []
    for row in compare_table(Scores.from_dict(before), Scores.from_dict(after)):
        metric = by_title[row.metric]
        old, new = real(before.get(metric.field)), real(after.get(metric.field))
        way = better(metric, old, new)
        rows.append(
            row._asdict()
            | {
                "direction": "" if way is None else "better" if way else "worse",
                "track": [100 * old, 100 * new] if metric.percent and old is not None and new is not None else None,
                "interval": "",
                "counts": None,
            }
        )
    return rows


def _stage_rows(
    run: Run, before: Mapping[str, Any], start: Mapping[str, Any], after: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return rows of a run that started from an adapter: start and result, with the base beside them."""
    bases = {row.metric: row.before for row in compare_table(Scores.from_dict(before), Scores.from_dict(after))}
    figures = paired_figures(run.results.get("comparison_with_start"))
    rows = paired_rows(figures) if figures else _plain_rows(start, after)
    return [row | {"base": bases.get(row["metric"], "–")} for row in rows]
