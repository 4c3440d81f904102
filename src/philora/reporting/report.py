"""The page of a run: `report.html`, made from what stands in the run folder and nothing else.

    config.yaml, metrics.jsonl, results.json, evaluation/results.json
        -> `read_run` -> `Run` -> text and coordinates -> template -> one file

Several runs have a page of their own, with their curves in one chart and their settings where they differ.

The page holds its style, its script and its charts; its content security policy forbids it to load anything and to run
any script but its own. Whatever a run lacks (it was stopped, nothing was held out) is left out of its page.
"""

from __future__ import annotations

import base64
import datetime
import difflib
import hashlib
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup

from philora.errors import ConfigError, DataError, fault
from philora.evaluation.measures import Paired
from philora.evaluation.scores import METRICS, Scores, better, compare_table, interval_of, shown_figure
from philora.files.checkpoint import write_text

MOST_RUNS = 8
"""Colours of a comparison."""

POINTS = 300
"""Buckets of a curve, each drawn by its lowest and highest value: more than a screen shows, and a small file."""

SECRETS = re.compile(r"hf_\w{8,}|(?<=hub_token: )\S+|(?<=hub_token=)\S+|(?<=api_key: )\S+|(?<=api_key=)\S+")
"""What a configuration or command may hold and a page that people pass on must not."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """What a run folder says.

    Attributes:
        folder: The run folder.
        config: The text of `config.yaml`; empty when there is none.
        metrics: The entries of `metrics.jsonl` in order of their step.
        results: `results.json`; empty for a run that has not ended.
        evaluation: `evaluation/results.json`, of `philora evaluate`; empty where it has not been called.
    """

    folder: Path
    config: str
    metrics: list[dict[str, Any]]
    results: dict[str, Any]
    evaluation: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    def series(self, key: str) -> list[Point]:
        """(step, value) of every entry that holds a finite number under `key`; of equal steps the last one."""
        points = {}
        for entry in self.metrics:
            value = _real(entry.get(key))
            if value is not None:
                points[float(entry["step"])] = value
        return sorted(points.items())

    def not_finite(self, key: str) -> list[int]:
        """Steps at which a value was logged that is no finite number: the mark of a run that diverged."""
        return [int(each["step"]) for each in self.metrics if each.get(key) is not None and _real(each[key]) is None]


class Curve(NamedTuple):
    """A line of a chart.

    Attributes:
        name: For the legend.
        style: CSS class of its stroke: `raw`, `smooth` or `eval`.
        points: What is drawn.
        dots: Each point is marked, for curves of few points.
    """

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False


def write_report(run_folder: Path, *, out: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run_folder: A run folder, of a run that ended, was stopped or still goes on.
        out: Where to; default: `report.html` in the run folder.

    Returns:
        The file, which holds either its old content or all of the new.

    Raises:
        DataError: The folder holds no run, or `results.json` is not what philora wrote.
    """
    target = Path(run_folder) / "report.html" if out is None else Path(out)
    write_text(target, render(read_run(Path(run_folder))))
    return target


def write_comparison(run_folders: Sequence[Path], out: Path) -> Path:
    """Write one page about several runs.

    Args:
        run_folders: Two to `MOST_RUNS` run folders, of runs that ended or not.
        out: The file, which holds either its old content or all of the new.

    Raises:
        ConfigError: There are too few or too many.
        DataError: As `write_report`.
    """
    if not 2 <= len(run_folders) <= MOST_RUNS:
        raise ConfigError(fault("report", "runs", len(run_folders), f"2 to {MOST_RUNS} runs to compare"))
    write_text(Path(out), render_comparison([read_run(Path(each)) for each in run_folders]))
    return Path(out)


def read_run(folder: Path) -> Run:
    """Read what a run folder holds; files that a run has not written yet count as empty.

    Raises:
        DataError: The folder holds no run, or a file is not what philora wrote.
    """
    names = ("config.yaml", "metrics.jsonl", "results.json")
    if not any((folder / name).is_file() for name in names):
        expected = f"a run folder, with {', '.join(names)}"
        raise DataError(fault("report", "run", str(folder), expected, "Give the folder that `philora train` wrote"))
    metrics = [entry for line in _text(folder / "metrics.jsonl").splitlines() if (entry := _entry(line)) is not None]
    return Run(
        folder,
        _text(folder / "config.yaml"),
        sorted(metrics, key=lambda entry: float(entry["step"])),
        _object(folder / "results.json"),
        _of_the_run(_object(folder / "evaluation" / "results.json")),
    )


def _of_the_run(evaluation: dict[str, Any]) -> dict[str, Any]:
    """An evaluation of the run's adapter; one of a checkpoint, which stood in the same place once, is passed over."""
    adapter = str(evaluation.get("adapter") or evaluation.get("source") or "")
    return {} if re.fullmatch(r"checkpoint-\d+", re.split(r"[/\\]", adapter.rstrip("/\\"))[-1]) else evaluation


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(path) or "{}")
    except json.JSONDecodeError as error:
        content = str(error)
    if not isinstance(content, dict):
        raise DataError(fault(str(path), "content", content, "a JSON object as philora writes it"))
    return content


def render(run: Run) -> str:
    """The page of a run as HTML."""
    return _render("report.html.j2", _view(run))


def render_comparison(runs: Sequence[Run]) -> str:
    """The page of several runs as HTML."""
    return _render("comparison.html.j2", _comparison_view(runs))


def _render(template: str, view: Mapping[str, Any]) -> str:
    script = _template_text("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        **view, style=Markup(_template_text("report.css")), script=Markup(script), script_digest=digest
    )


def smoothed(points: Sequence[Point], span: float) -> list[Point]:
    """Moving average over about `span` points, centred, so that it neither lags behind the values nor leads them.

    Towards the ends the window shrinks on both sides alike: a curve that falls steeply from its first step is not
    shown to begin lower than it did.
    """
    values = [y for _, y in points]
    for _ in range(2):  # twice half as wide: no corners where a single high value enters or leaves the window
        values = _centred_means(values, max(0, round(span / 4)))
    return [(x, y) for (x, _), y in zip(points, values, strict=True)]


def _centred_means(values: Sequence[float], radius: int) -> list[float]:
    """Mean of up to `radius` values on either side of each, as many on one as on the other."""
    sums = list(itertools.accumulate(values, initial=0.0))
    reach = [min(radius, index, len(values) - 1 - index) for index in range(len(values))]
    return [(sums[index + r + 1] - sums[index - r]) / (2 * r + 1) for index, r in enumerate(reach)]


def thinned(points: Sequence[Point], buckets: int = POINTS) -> list[Point]:
    """At most two points for each bucket, its lowest and its highest, so that a spike survives."""
    if len(points) <= 2 * buckets:
        return list(points)
    kept = {points[0], points[-1]}
    for index in range(buckets):
        part = points[index * len(points) // buckets : (index + 1) * len(points) // buckets]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about `count` steps apart, that enclose the range."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 15) for index in range(first, last + 1)]


def chart(
    title: str,
    curves: Sequence[Curve],
    *,
    form: Callable[[float], str],
    axis: Callable[[float], str] | None = None,
    from_zero: bool = False,
    note: str = "",
) -> dict[str, Any] | None:
    """A line chart as the template draws it: paths in a square of 1000, labels in percent of it.

    Args:
        title: What the chart shows, with its unit.
        curves: Drawn in order; those without points are left out.
        form: The text of a value.
        axis: The text of a value at the axis, where it is to be shorter.
        from_zero: The axis begins at zero.
        note: A remark beside the title, or below a large chart.

    Returns:
        None when there is nothing to draw: fewer than two points in every curve.
    """
    curves = [each for each in curves if each.points]
    if max((len(each.points) for each in curves), default=0) < 2:
        return None
    xs = [x for each in curves for x, _ in each.points]
    ys = [y for each in curves for _, y in each.points]
    left, right = min(xs), max(xs)
    marks = ticks(0.0 if from_zero else min(ys), max(ys))
    bottom, top = marks[0], marks[-1]

    def across(x: float) -> float:
        return (x - left) / (right - left)

    def down(y: float) -> float:
        return 1 - (y - bottom) / (top - bottom)

    drawn = []
    for each in curves:
        points = thinned(each.points)
        drawn.append(
            {
                "name": each.name,
                "style": each.style,
                "path": "M" + "L".join(f"{1000 * across(x):.1f},{1000 * down(y):.1f}" for x, y in points),
                "dots": [(f"{100 * across(x):.2f}", f"{100 * down(y):.2f}") for x, y in points] if each.dots else [],
            }
        )
    texts = [
        {"name": each.name, "style": each.style, "points": [(x, y, form(y)) for x, y in thinned(each.points)]}
        for each in curves
    ]
    steps = [mark for mark in ticks(left, right, 5) if left <= mark <= right and mark == int(mark)]
    return {
        "title": title,
        "note": note,
        "curves": drawn,
        "data": json.dumps({"left": left, "right": right, "bottom": bottom, "top": top, "curves": texts}),
        "y_marks": [(f"{100 * down(mark):.2f}", (axis or form)(mark)) for mark in marks],
        "x_marks": [(f"{100 * across(mark):.2f}", f"{mark:,.0f}") for mark in steps],
        "summary": f"{title}: "
        + "; ".join(f"{c.name} from {form(c.points[0][1])} to {form(c.points[-1][1])}" for c in curves),
    }


# -- the view: everything as text


def _view(run: Run) -> dict[str, Any]:
    """What the template shows, formatted; a part that the run lacks is None or empty."""
    results = run.results
    model = _mapping(results.get("model"))
    start = _mapping(results.get("start"))
    evaluated = bool(run.evaluation.get("after"))
    scored = run.evaluation if evaluated and not start else results
    before, after = (_mapping(scored.get(each)) for each in ("before", "after"))
    return {
        "name": str(model.get("name") or run.folder.resolve().name),
        "folder": run.folder.resolve().name,
        "state": None if results else _unfinished(run),
        "when": _when(results),
        "summary": _summary(start or before, after, "the start" if start else "the base") if before and after else None,
        "facts": _facts(run),
        "warnings": _warnings(run),
        "table": _stage_table(run, before, start, after) if start else _table(before, after, _figures(run)),
        "later_table": _paired_rows(_paired(run.evaluation.get("comparison"))) if start and evaluated else [],
        "forgetting": _paired_rows(_paired(run.evaluation.get("forgetting"))),
        "evaluated": _evaluated(run),
        "answers": int(_real(after.get("answers")) or 0),
        "label_tokens": _count(after.get("label_tokens") or before.get("label_tokens")),
        "samples": [_sample(each) for each in results.get("samples") or []],
        "loss_chart": _loss_chart(run),
        "charts": _small_charts(run),
        "coverage": _coverage(_mapping(results.get("coverage"))),
        "updates": _updates(results.get("updates")),
        "data": _data(_mapping(results.get("data"))),
        "command": _without_secrets(str(results.get("command") or "")),
        "config": _without_secrets(run.config),
        "versions": _versions(results),
        "philora": str(results.get("philora") or ""),
    }


def _unfinished(run: Run) -> str:
    """One line about a run without results."""
    if not run.metrics:
        return "No step has been logged yet."
    return f"This run has not ended: the page shows what was logged up to step {int(run.metrics[-1]['step']):,}."


def _when(results: Mapping[str, Any]) -> str:
    """The day and time of the run, and how long it took."""
    try:
        started = datetime.datetime.fromisoformat(str(results.get("started")))
        finished = datetime.datetime.fromisoformat(str(results.get("finished")))
    except ValueError:
        return ""
    zone = f" {started.tzname()}" if started.tzinfo else ""
    seconds = _real(results.get("duration_seconds"))  # missing in runs of older releases
    took = (finished - started).total_seconds() if seconds is None else seconds
    return f"{started.day} {started:%B %Y, %H:%M}{zone}" + (f" · took {_duration(took)}" if took >= 0 else "")


def _summary(before: Mapping[str, Any], after: Mapping[str, Any], beside: str) -> str | None:
    """The outcome in one sentence."""
    by_field = {metric.field: metric for metric in METRICS}
    for name, subject in (("exact_match", "Answers that equal the reference"), ("loss", "Loss on held-out data")):
        old, new = _real(before.get(name)), _real(after.get(name))
        if old is None or new is None:
            continue
        way = better(by_field[name], old, new)
        if way is None:
            return f"{subject}: no change."
        texts = {row.metric: row for row in compare_table(Scores.from_dict(before), Scores.from_dict(after))}
        row, verb = texts[by_field[name].title], "rose" if new > old else "fell"
        return f"{subject} {verb} from {row.before} to {row.after}{'.' if way else f': worse than {beside}.'}"
    return None


def _facts(run: Run) -> list[tuple[str, str, str]]:
    """Figures of the run: title, value, remark."""
    results = run.results
    speed, memory = _mapping(results.get("throughput")), _mapping(results.get("memory"))
    coverage = _mapping(results.get("coverage"))
    facts = []
    if (seconds := _real(speed.get("seconds"))) is not None:
        facts.append(("Training", _duration(seconds), f"{_count(speed.get('steps'))} steps"))
    if (rate := _real(speed.get("tokens_per_second"))) is not None:
        facts.append(("Throughput", f"{rate:,.0f}", f"tokens/s, {_short_count(speed.get('tokens'))} in all"))
    if (trainable := _real(coverage.get("trainable_parameters"))) is not None:
        total = _real(coverage.get("total_parameters"))
        share = f"{100 * trainable / total:.2g}% of {_short_count(total)}" if total else "parameters"
        facts.append(("Trained parameters", _short_count(trainable), share))
    if (peak := _real(memory.get("peak_bytes"))) is not None:
        facts.append(("Peak memory", f"{peak / 1e9:.1f} GB", ""))
    return facts


def _warnings(run: Run) -> list[str]:
    """What the reader must not miss."""
    warnings = []
    if broken := run.not_finite("loss"):
        warnings.append(f"The loss was not a finite number at {len(broken)} logged steps, first at step {broken[0]:,}.")
    if shared := _real(_mapping(run.results.get("data")).get("in_both")):
        warnings.append(f"{shared:,.0f} held-out rows also stand in the training data: the figures below flatter.")
    sentences = _mapping(run.results.get("judgement")).get("sentences")
    warnings += [f"{each[:1].upper()}{each[1:]}" for each in sentences or () if isinstance(each, str)]
    return warnings


def _paired(entries: Any) -> list[Paired]:
    """Figures with intervals, as `results.json` holds them; entries that are not whole are left out."""
    found = []
    for each in entries or []:
        try:
            found.append(Paired.from_dict(each))
        except (TypeError, AttributeError):
            continue
    return found


def _figures(run: Run) -> list[Paired]:
    """The newest figures with intervals: those of `philora evaluate` where it has been called."""
    return _paired(run.evaluation.get("comparison")) or _paired(run.results.get("comparison"))


def _evaluated(run: Run) -> str:
    """What the figures of `philora evaluate` are of."""
    rows = _real(run.evaluation.get("rows"))
    if rows is None:
        return ""
    return f"From philora evaluate: {rows:,.0f} rows, {_without_secrets(str(run.evaluation.get('data') or ''))}."


def _table(before: Mapping[str, Any], after: Mapping[str, Any], figures: Sequence[Paired] = ()) -> list[dict[str, Any]]:
    """The before/after table, with the direction of each change and the place of shares on a line from 0 to 100%."""
    if figures:
        return _paired_rows(figures)
    if not before and not after:
        return []
    by_title = {metric.title: metric for metric in METRICS}
    rows = []
    for row in compare_table(Scores.from_dict(before), Scores.from_dict(after)):
        metric = by_title[row.metric]
        old, new = _real(before.get(metric.field)), _real(after.get(metric.field))
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


def _stage_table(
    run: Run, before: Mapping[str, Any], start: Mapping[str, Any], after: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The table of a run that began with an adapter: as from the start to the result, with the base beside them."""
    bases = {row.metric: row.before for row in compare_table(Scores.from_dict(before), Scores.from_dict(after))}
    rows = _table(start, after, _paired(run.results.get("comparison_with_start")))
    return [row | {"base": bases.get(row["metric"], "–")} for row in rows]


def _paired_rows(figures: Sequence[Paired]) -> list[dict[str, Any]]:
    """Rows of the table with the interval of each change, and the examples on which the adapter is better or worse."""
    rows = []
    for each in figures:
        change, _, interval = interval_of(each).partition(" [")
        known = math.isfinite(each.before) and math.isfinite(each.after)
        rows.append(
            {
                "metric": each.title,
                "before": shown_figure(each.before, each),
                "after": shown_figure(each.after, each),
                "change": change,
                "interval": interval.rstrip("]").replace(", ", " to "),
                "direction": "" if each.verdict == "unclear" else each.verdict,
                "track": [100 * each.before, 100 * each.after] if each.percent and known else None,
                "counts": [each.wins, each.ties, each.losses],
            }
        )
    return rows


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt as bubbles, and the answers beside each other."""
    reference = str(sample.get("reference") or "")
    return {
        "prompt": [
            {"role": str(each.get("role", "")), "content": _content(each.get("content"))}
            for each in sample.get("prompt") or []
        ],
        "reference": reference,
        "answers": [
            {
                "who": who,
                "name": name,
                "pieces": marked(str(sample.get(who) or ""), reference),
                "matched": sample.get(f"{who}_matched"),
            }
            for who, name in (("base", "Base"), ("adapter", "With adapter"))
        ],
    }


def _content(content: Any) -> str:
    """The text of a message; content in parts (text, images) as its texts."""
    if isinstance(content, list):
        return " ".join(str(each.get("text", f"[{each.get('type')}]")) for each in content if isinstance(each, dict))
    return "" if content is None else str(content)


def marked(answer: str, reference: str) -> list[tuple[str, bool]]:
    """Pieces of an answer, each with whether it departs from the reference.

    An answer that shares less than half of its words with the reference is another answer altogether: one piece,
    unmarked. An empty answer has no piece.
    """
    if not answer.strip():
        return []
    words, wanted = re.findall(r"\S+\s*", answer), re.findall(r"\S+\s*", reference)
    matcher = difflib.SequenceMatcher(a=[w.strip() for w in wanted], b=[w.strip() for w in words], autojunk=False)
    if answer.split() == reference.split() or matcher.ratio() < 0.5:
        return [(answer, False)]
    pieces = []
    for kind, _, _, start, stop in matcher.get_opcodes():
        text = "".join(words[start:stop])
        end = len(text.rstrip())
        pieces += [(text[:end], kind != "equal"), (text[end:], False)]
    return [(text, differs) for text, differs in pieces if text]


def _pair(name: str, points: Sequence[Point]) -> tuple[list[Curve], str]:
    """A noisy curve and its smoothed one, with a word on the smoothing; a short one as it is, with its points."""
    if len(points) < 12:
        return [Curve(name, "smooth", points, dots=True)], ""
    span = max(5.0, len(points) / 16)
    curves = [Curve(name, "raw", points), Curve(f"{name}, smoothed", "smooth", smoothed(points, span))]
    return curves, f"smoothed over about {span:.0f} entries"


def _loss_chart(run: Run) -> dict[str, Any] | None:
    """Training loss, its smoothed curve, and the loss on held-out data."""
    held_out = run.series("eval_loss")
    curves, note = _pair("train", run.series("loss"))
    curves.append(Curve("held-out", "eval", held_out, dots=len(held_out) <= 40))
    return chart("Loss", curves, form=_number, note=note)


def _small_charts(run: Run) -> list[dict[str, Any]]:
    """Learning rate, gradient norm, throughput and memory, where they were logged."""

    def short(value: float) -> str:
        return _number(float(f"{value:.3g}"))

    rate, norm = run.series("learning_rate"), run.series("grad_norm")
    speed = run.series("tokens_per_second")
    memory = [(step, value / 1e9) for step, value in run.series("memory_bytes")]
    notes = [
        f"peak {_number(max(y for _, y in rate))}" if rate else "",
        f"last {short(norm[-1][1])}" if norm else "",
        f"median {_count(statistics.median(y for _, y in speed))}" if speed else "",
        f"peak {short(max(y for _, y in memory))}" if memory else "",
    ]
    charts = [
        chart("Learning rate", [Curve("", "smooth", rate)], form=_number, from_zero=True, note=notes[0]),
        chart("Gradient norm", _pair("norm", norm)[0], form=short, from_zero=True, note=notes[1]),
        chart(
            "Tokens per second",
            _pair("tokens/s", speed)[0],
            form=_count,
            axis=_short_count,
            from_zero=True,
            note=notes[2],
        ),
        chart("Memory, GB", [Curve("", "smooth", memory)], form=short, from_zero=True, note=notes[3]),
    ]
    return [each for each in charts if each is not None]


def _coverage(coverage: Mapping[str, Any]) -> dict[str, Any] | None:
    """The modules that were adapted."""
    rows = coverage.get("rows")
    if not rows:
        return None
    return {
        "rows": [
            {
                "name": str(row.get("slice") or str(row.get("module") or "").rpartition(".")[2]),
                "place": (str(row.get("module") or "") if row.get("slice") else _parent(row.get("module"))).split("."),
                "r": _count(row.get("r")),
                "scaling": _number(scaling) if (scaling := _real(row.get("scaling"))) is not None else "–",
                "modules": _count(row.get("modules")),
                "parameters": _count(row.get("parameters")),
            }
            for row in rows
        ],
        "trainable": _count(coverage.get("trainable_parameters")),
    }


def _parent(module: Any) -> str:
    return str(module or "").rpartition(".")[0]


PARTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""Parts of a layer in the order that data takes through it."""


def _updates(entries: Any) -> dict[str, Any] | None:
    """How far each module was moved: a row for each part of a layer, a cell for each layer."""
    found: dict[str, dict[int, tuple[float, str]]] = {}
    for each in entries or []:
        norm, share = _real(_mapping(each).get("norm")), _real(_mapping(each).get("relative"))
        if norm is None:
            continue
        module = str(each.get("module") or "")
        numbered = re.fullmatch(r"(?:.*\.)?(\d+)\.(?:.*\.)?([^.]+)", module)
        layer, part = (int(numbered[1]), numbered[2]) if numbered else (0, module.rpartition(".")[2])
        name = str(each.get("slice") or part)
        percent = "" if share is None else f", {_shown_share(share, True)} of the weight's"
        text = f"{name}, layer {layer}: norm {_number(float(f'{norm:.3g}'))}{percent}"
        found.setdefault(name, {})[layer] = (norm if share is None else share, text)
    if not found:
        return None
    layers = range(max(max(each) for each in found.values()) + 1)
    highest = max(value for each in found.values() for value, _ in each.values()) or 1.0
    relative = all(_real(_mapping(each).get("relative")) is not None for each in entries)
    rows = [
        {
            "name": name,
            "cells": [
                (f"{found[name][layer][0] / highest:.3f}", found[name][layer][1]) if layer in found[name] else None
                for layer in layers
            ],
            "mean": _shown_share(statistics.fmean(value for value, _ in found[name].values()), relative),
        }
        for name in sorted(found, key=lambda each: (PARTS.index(each) if each in PARTS else len(PARTS), each))
    ]
    most = max(((value, text) for each in found.values() for value, text in each.values()), default=(0.0, ""))
    return {"rows": rows, "last": len(layers) - 1, "relative": relative, "most": most[1]}


def _shown_share(value: float, relative: bool) -> str:
    if not relative:
        return _number(float(f"{value:.3g}"))
    return f"{100 * value:.2g}%" if value < 0.995 else f"{100 * value:,.0f}%"


DATA_COLUMNS = {
    "rows": "Rows",
    "tokens": "Tokens",
    "labels": "Label tokens",
    "longest_tokens": "Longest, tokens",
    "truncated": "Truncated",
    "dropped": "Dropped",
    "duplicates": "Duplicates",
}


def _data(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Counts by split, lengths, one example with its labels, the sources, and the notices."""
    counts = {name: _mapping(data.get(name)) for name in ("train", "eval") if data.get(name)}
    if not counts:
        return None
    keys = [key for key in DATA_COLUMNS if any(key in each for each in counts.values())]
    return {
        "splits": list(counts),
        "rows": [(DATA_COLUMNS[key], [_count(each.get(key)) for each in counts.values()]) for key in keys],
        "lengths": _lengths(_mapping(data.get("lengths"))),
        "preview": _preview(data.get("preview")),
        "sources": [
            {
                "split": str(split),
                "name": str(each.get("name") or ""),
                "format": str(each.get("format") or ""),
                "recognised": str(each.get("recognised") or ""),
                "examples": [str(example) for example in each.get("examples") or []],
                "records": _count(each.get("records")),
            }
            for split, sources in _mapping(data.get("sources")).items()
            for each in sources or []
        ],
        "notices": [str(each) for each in data.get("notices") or []],
    }


def _lengths(lengths: Mapping[str, Any]) -> dict[str, Any] | None:
    """Bars of the histogram of lengths, in percent of the highest."""
    counts, edges = lengths.get("counts") or [], lengths.get("edges") or []
    if len(counts) < 2 or len(edges) != len(counts) + 1:
        return None
    highest = max(counts) or 1
    return {
        "bars": [
            (f"{100 * count / highest:.1f}", f"{low:,.0f} to {high:,.0f} tokens: {count:,}")
            for count, low, high in zip(counts, edges, edges[1:], strict=False)
        ],
        "low": f"{edges[0]:,.0f}",
        "high": f"{edges[-1]:,.0f}",
        "median": _count(lengths.get("median")),
    }


def _preview(tokens: Any) -> list[tuple[str, bool]]:
    """An example in pieces, each with whether the loss is on it."""
    pairs = [(str(text), bool(labelled)) for text, labelled in tokens or []]
    return [
        ("".join(text for text, _ in group), labelled)
        for labelled, group in itertools.groupby(pairs, key=lambda each: each[1])
    ]


# -- several runs


def _comparison_view(runs: Sequence[Run]) -> dict[str, Any]:
    """What the page of several runs shows, formatted."""
    names = _distinct_names(runs)
    styles = [f"run-{index}" for index in range(len(runs))]
    charts = []
    for title, key, form, axis in (
        ("Loss, smoothed", "loss", _number, _number),
        ("Loss on held-out data", "eval_loss", _number, _number),
        ("Gradient norm, smoothed", "grad_norm", _number, _number),
        ("Tokens per second, smoothed", "tokens_per_second", _count, _short_count),
    ):
        curves = []
        for run, name, style in zip(runs, names, styles, strict=True):
            points = run.series(key)
            if "smoothed" in title and len(points) >= 12:
                points = smoothed(points, max(5.0, len(points) / 16))
            curves.append(Curve(name, style, points, dots=len(points) <= 12))
        drawn = chart(title, curves, form=form, axis=axis, from_zero=key != "loss" and key != "eval_loss")
        if drawn is not None:
            charts.append(drawn)
    rows = [(title, values) for title, values in _compared(runs) if any(each != "–" for each in values)]
    return {
        "names": list(zip(names, styles, strict=True)),
        "rows": rows,
        "charts": charts,
        "settings": _differing(runs),
        "commands": [(name, _without_secrets(str(run.results.get("command") or ""))) for name, run in
                     zip(names, runs, strict=True) if run.results.get("command")],
        "philora": str(next((run.results["philora"] for run in runs if run.results.get("philora")), "")),
    }  # fmt: skip


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    paths = [run.folder.resolve().parts for run in runs]
    for depth in range(1, max(len(each) for each in paths) + 1):
        names = ["/".join(each[-depth:]) for each in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({index + 1})" for index, run in enumerate(runs)]


def _compared(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Figures of each run, a row for each."""

    def of(read: Callable[[Run], str | None]) -> list[str]:
        return [read(run) or "–" for run in runs]

    def figure(field: str, which: str) -> Callable[[Run], str | None]:
        def read(run: Run) -> str | None:
            for each in _figures(run):
                if each.field == field:
                    return shown_figure(getattr(each, which), each)
            metric = next((each for each in METRICS if each.field == field), None)
            value = _real(_mapping(run.results.get("before" if which == "before" else "after")).get(field))
            return shown_figure(value, metric) if metric is not None and value is not None else None

        return read

    titles = {each.field: each.title for run in runs for each in _figures(run)}
    titles = {each.field: each.title for each in METRICS} | titles
    rows = [("Base model", of(lambda run: str(_mapping(run.results.get("model")).get("name") or "")))]
    for name, title in titles.items():
        rows.append((title, of(figure(name, "after"))))
    rows.append(("Loss of the base", of(figure("loss", "before"))))

    def number(*keys: str, form: Callable[[float], str]) -> Callable[[Run], str | None]:
        def read(run: Run) -> str | None:
            value: Any = run.results
            for key in keys:
                value = _mapping(value).get(key)
            real = _real(value)
            return None if real is None else form(real)

        return read

    rows += [
        ("Last training loss", of(lambda run: _number(run.series("loss")[-1][1]) if run.series("loss") else None)),
        ("Steps", of(number("throughput", "steps", form=_count))),
        ("Tokens per second", of(number("throughput", "tokens_per_second", form=_count))),
        ("Training time", of(number("throughput", "seconds", form=_duration))),
        ("Peak memory", of(number("memory", "peak_bytes", form=lambda value: f"{value / 1e9:.1f} GB"))),
        ("Trained parameters", of(number("coverage", "trainable_parameters", form=_short_count))),
    ]
    return rows


def _differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs; where a run writes to is not one."""
    flat = [_flat(yaml.safe_load(_without_secrets(run.config)) or {}) for run in runs]
    keys = sorted({key for each in flat for key in each} - {"training_config.output_dir", "training_config.run_name"})
    found = []
    for key in keys:
        values = [each.get(key, "–") for each in flat]
        if len(set(values)) > 1:
            found.append((key, values))
    return found


def _flat(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        parts = (_flat(each, f"{key}.{part}" if key else str(part)) for part, each in value.items())
        return {name: text for part in parts for name, text in part.items()}
    return {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)}


def _versions(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = {str(name): str(version) for name, version in _mapping(results.get("versions")).items()}
    if results.get("philora"):
        versions = {"philora": str(results["philora"])} | versions
    return list(versions.items())


# -- values as text


def _number(value: float) -> str:
    """Three or four significant digits, without an exponent where one can be spared."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "−")


def _count(value: Any) -> str:
    number = _real(value)
    return "–" if number is None else f"{number:,.0f}"


def _short_count(value: Any) -> str:
    number = _real(value)
    if number is None:
        return "–"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _real(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _without_secrets(text: str) -> str:
    return SECRETS.sub("•••", text)


def _entry(line: str) -> dict[str, Any] | None:
    """A line of `metrics.jsonl`; None for one that a crash has torn."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and _real(entry.get("step")) is not None else None


def _template_text(name: str) -> str:
    return (resources.files("philora") / "templates" / name).read_text(encoding="utf-8")
