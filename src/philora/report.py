"""The page of a run: `report.html`, made from what stands in the run folder and nothing else.

    config.yaml, metrics.jsonl, results.json -> `read_run` -> `Run` -> text and coordinates -> template -> one file

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
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from philora.checkpoint import write_text
from philora.errors import DataError, fault
from philora.evaluation import METRICS, Scores, better, compare_table

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
    """

    folder: Path
    config: str
    metrics: list[dict[str, Any]]
    results: dict[str, Any]

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


def read_run(folder: Path) -> Run:
    """Read what a run folder holds; files that a run has not written yet count as empty.

    Raises:
        DataError: The folder holds no run, or `results.json` is not what philora wrote.
    """
    files = {name: folder / name for name in ("config.yaml", "metrics.jsonl", "results.json")}
    if not any(path.is_file() for path in files.values()):
        expected = f"a run folder, with {', '.join(files)}"
        raise DataError(fault("report", "run", str(folder), expected, "Give the folder that `philora train` wrote"))
    text = {name: path.read_text(encoding="utf-8") if path.is_file() else "" for name, path in files.items()}
    try:
        results = json.loads(text["results.json"] or "{}")
    except json.JSONDecodeError as error:
        results = str(error)
    if not isinstance(results, dict):
        raise DataError(fault(str(files["results.json"]), "content", results, "a JSON object as philora writes it"))
    metrics = [entry for line in text["metrics.jsonl"].splitlines() if (entry := _entry(line)) is not None]
    return Run(folder, text["config.yaml"], sorted(metrics, key=lambda entry: float(entry["step"])), results)


def render(run: Run) -> str:
    """The page of a run as HTML."""
    script = _template_text("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        **_view(run), style=Markup(_template_text("report.css")), script=Markup(script), script_digest=digest
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
    before, after = (_mapping(results.get(each)) for each in ("before", "after"))
    return {
        "name": str(model.get("name") or run.folder.resolve().name),
        "folder": run.folder.resolve().name,
        "state": None if results else _unfinished(run),
        "when": _when(results),
        "summary": _summary(before, after) if before and after else None,
        "facts": _facts(run),
        "warnings": _warnings(run),
        "table": _table(before, after),
        "answers": int(_real(after.get("answers")) or 0),
        "label_tokens": _count(after.get("label_tokens") or before.get("label_tokens")),
        "samples": [_sample(each) for each in results.get("samples") or []],
        "loss_chart": _loss_chart(run),
        "charts": _small_charts(run),
        "coverage": _coverage(_mapping(results.get("coverage"))),
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
    return f"{started.day} {started:%B %Y, %H:%M}{zone} · took {_duration((finished - started).total_seconds())}"


def _summary(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
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
        return f"{subject} {verb} from {row.before} to {row.after}{'.' if way else ': worse than the base.'}"
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
    return warnings


def _table(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The before/after table, with the direction of each change and the place of shares on a line from 0 to 100%."""
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
    """Counts by split, the sources, and the notices."""
    splits = _mapping(data.get("splits"))
    if not splits:
        return None
    counts = {name: _mapping(each) for name, each in splits.items()}
    keys = [key for key in DATA_COLUMNS if any(key in each for each in counts.values())]
    return {
        "splits": list(counts),
        "rows": [(DATA_COLUMNS[key], [_count(each.get(key)) for each in counts.values()]) for key in keys],
        "sources": [
            {
                "split": str(split),
                "name": str(each.get("name") or ""),
                "format": str(each.get("format") or ""),
                "records": _count(each.get("records")),
            }
            for split, sources in _mapping(data.get("sources")).items()
            for each in sources or []
        ],
        "notices": [str(each) for each in data.get("notices") or []],
    }


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
