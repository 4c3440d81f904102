"""Prepare the page of one run: texts and coordinates for the template."""

from __future__ import annotations

import datetime
import itertools
import re
import shlex
import statistics
from collections.abc import Mapping
from typing import Any

from philora.reporting.answers import answers_view
from philora.reporting.charts import Axis, Curve, chart, noisy_pair
from philora.reporting.formatting import count, duration, mapping, number, real, short_count, without_secrets
from philora.reporting.run_record import Run, paired_figures
from philora.reporting.tables import before_and_after, paired_rows
from philora.reporting.verdict import verdict_of


def run_view(run: Run) -> dict[str, Any]:
    """Return the formatted content of the page; a part that the run does not have is None or empty."""
    results = run.results
    start = mapping(results.get("start"))
    evaluated = bool(run.evaluation.get("after"))
    scored = run.evaluation if evaluated and not start else results
    before, after = (mapping(scored.get(key)) for key in ("before", "after"))
    return {
        "name": run.name,
        "base": _base(run),
        "when": _when(results),
        "progress": None if results else _progress(run),
        "verdict": verdict_of(run),
        "warnings": _warnings(run),
        "table": before_and_after(run),
        "later_table": paired_rows(paired_figures(run.evaluation.get("comparison"))) if start and evaluated else [],
        "forgetting": paired_rows(paired_figures(run.evaluation.get("forgetting"))),
        "evaluated": _evaluated(run),
        "generated": int(real(after.get("answers")) or 0),
        "label_tokens": count(after.get("label_tokens") or before.get("label_tokens")),
        "answers": answers_view(run),
        "loss_chart": _loss_chart(run),
        "charts": _small_charts(run),
        "machine": _machine(run),
        "coverage": _coverage(mapping(results.get("coverage"))),
        "updates": _updates(results.get("updates")),
        "data": _data(mapping(results.get("data"))),
        "command": without_secrets(str(results.get("command") or "")),
        "config": without_secrets(run.config),
        "versions": _versions(results),
        "philora": str(results.get("philora") or ""),
    }


def _base(run: Run) -> str:
    """Return the base's name, from the configuration if the run has not ended."""
    named = mapping(run.results.get("model")).get("name")
    return str(named or mapping(run.settings().get("model")).get("name_or_path") or "")


def _progress(run: Run) -> dict[str, Any]:
    """Return the progress of a run without results, and the commands to resume it and to write its page again."""
    step, steps = run.last_step(), _planned_steps(run)
    text = f"step {step:,.0f}" + (f" of {steps:,}" if steps else "") if step else "no step has been logged yet"
    running = run.status == "running"
    if running and steps and (left := _seconds_left(run, steps)) is not None:
        text += f", about {duration(left)} left"
    state = "Running" if running else run.status[:1].upper() + run.status[1:] if run.status != "done" else "Not ended"
    return {
        "text": f"{state}: {text}.",
        "share": min(100.0, 100 * step / steps) if steps else None,
        "resume": None if running else f"philora train {shlex.quote(str(run.folder))} --resume",
        "again": f"philora report {shlex.quote(str(run.folder))}",
    }


def _planned_steps(run: Run) -> int | None:
    """Return the planned number of steps, from the settings and the last logged epoch."""
    training = mapping(run.settings().get("training_config"))
    steps, epochs = real(training.get("max_steps")), real(training.get("num_train_epochs"))
    if steps and steps > 0:
        return int(steps)
    logged = [entry for entry in run.metrics if real(entry.get("epoch")) and entry["step"]]
    if not logged or not epochs:
        return None
    return max(round(float(logged[-1]["step"]) * epochs / float(logged[-1]["epoch"])), int(run.last_step()))


def _seconds_left(run: Run, steps: int) -> float | None:
    """Return the time that the remaining steps take at the pace of the logged ones."""
    times = run.series("time")
    if len(times) < 2 or times[-1][0] <= times[0][0]:
        return None
    pace = (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])
    return max(0.0, pace * (steps - times[-1][0]))


def _when(results: Mapping[str, Any]) -> str:
    """Return the day and time of the run, and how long it took."""
    try:
        started = datetime.datetime.fromisoformat(str(results.get("started")))
        finished = datetime.datetime.fromisoformat(str(results.get("finished")))
    except ValueError:
        return ""
    zone = f" {started.tzname()}" if started.tzinfo else ""
    seconds = real(results.get("duration_seconds"))  # missing in runs of older releases
    took = (finished - started).total_seconds() if seconds is None else seconds
    return f"{started.day} {started:%B %Y, %H:%M}{zone}" + (f" · took {duration(took)}" if took >= 0 else "")


def _warnings(run: Run) -> list[str]:
    """Return warnings that are shown with the verdict."""
    warnings = []
    losses = [(entry["step"], entry["loss"]) for entry in run.metrics if entry.get("loss") is not None]
    if broken := [int(step) for step, loss in losses if real(loss) is None]:  # the run diverged
        warnings.append(f"The loss was not a finite number at {len(broken)} logged steps, first at step {broken[0]:,}.")
    if shared := real(mapping(run.results.get("data")).get("in_both")):
        warnings.append(f"{shared:,.0f} held-out rows are also in the training data: the figures below are too good.")
    return warnings


def _evaluated(run: Run) -> str:
    """Return the rows and data of the figures of `philora evaluate`."""
    rows = real(run.evaluation.get("rows"))
    if rows is None:
        return ""
    return f"From philora evaluate: {rows:,.0f} rows, {without_secrets(str(run.evaluation.get('data') or ''))}."


def _axis(run: Run) -> Axis:
    """Return the axis that all charts of the page share."""
    return Axis(0.0, run.last_step(), run.kept_step())


def _loss_chart(run: Run) -> dict[str, Any] | None:
    """Return the chart of the training loss, raw and smoothed, and of the held-out loss from the base's on."""
    held_out = run.held_out_losses()
    curves, note = noisy_pair("train", run.series("loss"))
    curves.append(Curve("held-out", "eval", held_out, dots=len(held_out) <= 40))
    return chart("Loss", curves, _axis(run), form=number, note=note)


def _small_charts(run: Run) -> list[dict[str, Any]]:
    """Return charts of learning rate, gradient norm, throughput and memory, if they were logged."""

    def short(value: float) -> str:
        return number(float(f"{value:.3g}"))

    axis = _axis(run)._replace(kept=None)
    rate, norm = run.series("learning_rate"), run.series("grad_norm")
    speed = run.series("tokens_per_second")
    memory = [(step, value / 1e9) for step, value in run.series("memory_bytes")]
    notes = [
        f"peak {number(max(y for _, y in rate))}" if rate else "",
        f"last {short(norm[-1][1])}" if norm else "",
        f"median {count(statistics.median(y for _, y in speed))}" if speed else "",
        f"peak {short(max(y for _, y in memory))}" if memory else "",
    ]
    norms, speeds = noisy_pair("norm", norm)[0], noisy_pair("tokens/s", speed)[0]
    charts = [
        chart("Learning rate", [Curve("", "smooth", rate)], axis, form=number, from_zero=True, note=notes[0]),
        chart("Gradient norm", norms, axis, form=short, from_zero=True, note=notes[1]),
        chart("Tokens per second", speeds, axis, form=count, short_form=short_count, from_zero=True, note=notes[2]),
        chart("Memory, GB", [Curve("", "smooth", memory)], axis, form=short, from_zero=True, note=notes[3]),
    ]
    return [drawn for drawn in charts if drawn is not None]


def _machine(run: Run) -> list[tuple[str, str, str]]:
    """Return facts of the training on this machine: title, value, remark."""
    results = run.results
    speed, memory = mapping(results.get("throughput")), mapping(results.get("memory"))
    coverage = mapping(results.get("coverage"))
    facts = []
    if (seconds := real(speed.get("seconds"))) is not None:
        facts.append(("Training", duration(seconds), f"{count(speed.get('steps'))} steps"))
    if (rate := real(speed.get("tokens_per_second"))) is not None:
        facts.append(("Throughput", f"{rate:,.0f}", f"tokens/s, {short_count(speed.get('tokens'))} in all"))
    if (trainable := real(coverage.get("trainable_parameters"))) is not None:
        total = real(coverage.get("total_parameters"))
        share = f"{100 * trainable / total:.2g}% of {short_count(total)}" if total else "parameters"
        facts.append(("Trained parameters", short_count(trainable), share))
    if (peak := real(memory.get("peak_bytes"))) is not None:
        facts.append(("Peak memory", f"{peak / 1e9:.1f} GB", ""))
    plan = mapping(results.get("plan"))
    if str(plan.get("device")).startswith("cuda") and "deterministic" in plan:
        facts.append(("Repeatable", "yes" if plan["deterministic"] else "no", "training_config.deterministic"))
    return facts


def _coverage(coverage: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the modules that were adapted."""
    rows = coverage.get("rows")
    if not rows:
        return None
    return {
        "rows": [
            {
                "name": str(row.get("slice") or module.rpartition(".")[2]),
                "place": (module if row.get("slice") else module.rpartition(".")[0]).split("."),
                "r": count(row.get("r")),
                "scaling": number(scaling) if (scaling := real(row.get("scaling"))) is not None else "–",
                "modules": count(row.get("modules")),
                "parameters": count(row.get("parameters")),
            }
            for row, module in ((row, str(row.get("module") or "")) for row in rows)
        ],
        "trainable": count(coverage.get("trainable_parameters")),
    }


PARTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""Parts of a layer in the order of computation."""


def _updates(entries: Any) -> dict[str, Any] | None:
    """Return the size of every module's update: a row for every part of a layer, a cell for every layer."""
    found: dict[str, dict[int, tuple[float, str]]] = {}
    for entry in entries or []:
        norm, share = real(mapping(entry).get("norm")), real(mapping(entry).get("relative"))
        if norm is None:
            continue
        module = str(entry.get("module") or "")
        numbered = re.fullmatch(r"(?:.*\.)?(\d+)\.(?:.*\.)?([^.]+)", module)
        layer, part = (int(numbered[1]), numbered[2]) if numbered else (0, module.rpartition(".")[2])
        name = str(entry.get("slice") or part)
        percent = "" if share is None else f", {_shown_share(share, True)} of the weight's"
        text = f"{name}, layer {layer}: norm {number(float(f'{norm:.3g}'))}{percent}"
        found.setdefault(name, {})[layer] = (norm if share is None else share, text)
    if not found:
        return None
    layers = range(max(max(item) for item in found.values()) + 1)
    highest = max(value for item in found.values() for value, _ in item.values()) or 1.0
    relative = all(real(mapping(item).get("relative")) is not None for item in entries)
    rows = [
        {
            "name": name,
            "cells": [
                (f"{found[name][layer][0] / highest:.3f}", found[name][layer][1]) if layer in found[name] else None
                for layer in layers
            ],
            "mean": _shown_share(statistics.fmean(value for value, _ in found[name].values()), relative),
        }
        for name in sorted(found, key=lambda item: (PARTS.index(item) if item in PARTS else len(PARTS), item))
    ]
    most = max(((value, text) for item in found.values() for value, text in item.values()), default=(0.0, ""))
    return {"rows": rows, "last": len(layers) - 1, "relative": relative, "most": most[1]}


def _shown_share(value: float, relative: bool) -> str:
    if not relative:
        return number(float(f"{value:.3g}"))
    return f"{100 * value:.2g}%" if value < 0.995 else f"{100 * value:,.0f}%"


DATA_COLUMNS = {
    "rows": "Rows", "tokens": "Tokens", "labels": "Label tokens", "longest_tokens": "Longest, tokens",
    "truncated": "Truncated", "dropped": "Dropped", "duplicates": "Duplicates",
}  # fmt: skip


def _data(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return counts by split, lengths, one example with its labels, the sources, and the notices."""
    counts = {name: mapping(data.get(name)) for name in ("train", "eval") if data.get(name)}
    if not counts:
        return None
    keys = [key for key in DATA_COLUMNS if any(key in item for item in counts.values())]
    return {
        "splits": list(counts),
        "rows": [(DATA_COLUMNS[key], [count(item.get(key)) for item in counts.values()]) for key in keys],
        "lengths": _lengths(mapping(data.get("lengths"))),
        "preview": _preview(data.get("preview")),
        "sources": [
            {
                **{key: str(source.get(key) or "") for key in ("name", "format", "recognised")},
                "split": str(split),
                "examples": [str(example) for example in source.get("examples") or []],
                "records": count(source.get("records")),
            }
            for split, sources in mapping(data.get("sources")).items()
            for source in sources or []
        ],
        "notices": [str(notice) for notice in data.get("notices") or []],
    }


def _lengths(lengths: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the bars of the histogram of lengths, in percent of the highest."""
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
        "median": count(lengths.get("median")),
    }


def _preview(tokens: Any) -> list[tuple[str, bool]]:
    """Return an example in pieces, with whether each has a loss."""
    pairs = [(str(text), bool(labelled)) for text, labelled in tokens or []]
    return [
        ("".join(text for text, _ in group), labelled)
        for labelled, group in itertools.groupby(pairs, key=lambda item: item[1])
    ]


def _versions(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    own = {"philora": results["philora"]} if results.get("philora") else {}
    return [(str(name), str(version)) for name, version in (own | dict(mapping(results.get("versions")))).items()]
