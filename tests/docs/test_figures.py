"""The figures in the documents are those of the rows in benchmarks/results."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rows(name):
    with (ROOT / "benchmarks" / "results" / name).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def speeds():
    """The last run of TRL at the card's settings and philora at work a, by contestant."""
    found = [row for row in rows("training.csv") if row["work"] == "a"]
    last = max(row["date"] for row in found if row["contestant"] == "trl-card")
    return {row["contestant"]: row for row in found if row["date"] == last}


def ratio(speeds, one, other):
    return f"{float(speeds[one]['tokens_per_second']) / float(speeds[other]['tokens_per_second']):.1f}"


def gigabytes(row):
    return f"{float(row['peak_bytes']) / 1e9:.1f}"


def readme_speed(speeds):
    """The lines of the README's table."""
    speed = {name: f"{float(row['tokens_per_second']):.0f}" for name, row in speeds.items()}
    peak = {name: gigabytes(row) for name, row in speeds.items()}
    over = {name: ratio(speeds, name, "trl-card") for name in speeds}
    pair = lambda of, one: f"{of[one]} / {of[f'{one}-0']}"  # noqa: E731
    return [
        f"| TRL + PEFT, the model card's settings | {speed['trl-card']} | {over['trl-card']} | {peak['trl-card']} GB |",
        f"| TRL + PEFT, best setting, dropout 0.05 / 0 | {pair(speed, 'trl-best')} | {pair(over, 'trl-best')} "
        f"| {pair(peak, 'trl-best')} GB |",
        f"| philora, dropout 0.05 / 0 | {pair(speed, 'philora')} | **{pair(over, 'philora')}** "
        f"| {pair(peak, 'philora')} GB |",
    ]


def test_the_readme_has_the_rows_of_training(speeds):
    for line in readme_speed(speeds):
        assert line in page("README.md"), line


def test_the_page_on_performance_has_the_rows_of_training(speeds):
    text = page("docs/performance.md")
    card = f"{ratio(speeds, 'philora', 'trl-card')} / {ratio(speeds, 'philora-0', 'trl-card')} times"
    best = f"{ratio(speeds, 'philora', 'trl-best')} / {ratio(speeds, 'philora-0', 'trl-best-0')} times"
    share = " / ".join(f"{100 * float(speeds[name]['share_of_limit']):.0f}" for name in ("philora", "philora-0"))
    for said in (card, best, f"{share}%"):
        assert f"| {said} |" in text, said


def test_another_row_is_found(speeds):
    changed = {name: dict(row) for name, row in speeds.items()}
    changed["philora"]["tokens_per_second"] = str(1.02 * float(changed["philora"]["tokens_per_second"]))
    assert not all(line in page("README.md") for line in readme_speed(changed))


def test_the_readme_has_the_demo_of_the_last_commit_that_was_measured():
    measured = [row for row in rows("demo.csv") if row["seed"] == "42"][-1]
    shown = re.search(r"Exact match +(\S+)% +(\S+)% ", page("README.md"))
    assert shown is not None
    assert shown[1] == f"{100 * float(measured['exact_match_before']):.1f}"
    assert shown[2] == f"{100 * float(measured['exact_match_after']):.1f}"


def test_the_page_on_memory_has_the_rows_of_memory():
    text = page("docs/memory.md")
    key = ("width", "layers", "base", "recomputation", "answers")
    last = {tuple(row[name] for name in key): row for row in rows("memory.csv")}
    shown = re.findall(r"^\| (\d+) x (\d+) \| (\w+) \| (\w+)(?:, (\d+) answers)? \| (.+) \|$", text, re.MULTILINE)
    assert len(shown) >= 10
    for width, layers, base, grade, answers, figures in shown:
        row = last[width, layers, base, grade, answers or "0"]
        estimated, measured, anonymous = (
            f"{float(row[name]) / 1e6:,.0f}" for name in ("estimated_peak", "measured_peak", "measured_anonymous")
        )
        assert figures.startswith(f"{estimated} | {measured} | {anonymous} | "), (width, layers, base, grade, answers)


def test_the_page_on_memory_has_the_rows_of_the_full_size():
    text = page("docs/memory.md")
    for base in ("bf16", "nf4"):
        found = [row for row in rows("full_size.csv") if row["what"] == base][-1]
        names = ("anonymous_gib_loading", "anonymous_gib_training", "file_pages_gib")
        loading, training, files = (f"{float(found[name]):.2f}" for name in names)
        assert f"| {base} | {loading} | {training} | {files} |" in text


def test_the_page_on_settings_has_the_rows_of_settings():
    from benchmarks.settings import table

    assert f"<!-- table: settings.csv -->\n\n{table()}\n<!-- end -->" in page("docs/settings.md")
    assert table().count("\n") > 12


def test_the_page_on_settings_has_the_rows_of_rates():
    from benchmarks.rates import table

    assert f"<!-- table: rates.csv -->\n\n{table()}\n<!-- end -->" in page("docs/settings.md")
    assert table().count("\n") > 8


def test_the_page_on_performance_has_the_rows_of_generation():
    text = page("docs/performance.md")
    for work, dtype in (("nano", "bfloat16"), ("a", "bfloat16"), ("nano", "float32"), ("a", "float32")):
        found = [row for row in rows("generation.csv") if (row["work"], row["dtype"]) == (work, dtype)]
        last = {row["contestant"]: row for row in found}
        speed = {name: float(row["tokens_per_second"]) for name, row in last.items()}
        over = [f"{speed[f'philora, {how}'] / speed[f'pipeline, {how}']:.1f}" for how in ("adapter", "merged")]
        same = [f"{float(last[f'philora, {how}']['answers_as_the_pipeline']):.0%}" for how in ("adapter", "merged")]
        shown = {"nano": "nano", "a": "187 M"}[work], {"bfloat16": "bf16", "float32": "fp32"}[dtype]
        assert f"| {', '.join(shown)} | {' / '.join(over)} | {' / '.join(same)} |" in text


CONTESTANTS = {
    "philora": "philora",
    "trl": "TRL + PEFT",
    "plain": "a plain loop with PEFT",
    "liger": "the same with Liger's kernels",
}


def first_on_a_gpu():
    """The first measurement of a GPU as docs/performance.md shows it."""
    lines = ["| contestant | base | tokens/s | share of the limit | peak GB |", "| --- | --- | --- | --- | --- |"]
    for row in [row for row in rows("gpu.csv") if row["commit"] == "38c5060" and row["status"] == "ok"]:
        speed, share = float(row["tokens_per_second"]), float(row["share_of_limit"])
        peak = float(row["max_memory_allocated"]) / 1e9
        name = CONTESTANTS[row["contestant"]]
        lines.append(f"| {name} | {row['base']} | {speed:,.0f} | {100 * share:.1f}% | {peak:.1f} |")
    return "\n".join(lines)


def prototype_on_a_gpu():
    """The prototype's rows whose loss is that of the other rows of their size."""
    lines = [
        "| base products | kept | tokens a row | CUDA graph | tokens/s | peak GB | training loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows("gpu_prototype.csv"):
        if row["longest_document_in_graph"] == "1024":
            continue
        size, speed = int(row["row_tokens"]), int(row["tokens_per_second"])
        rest = f"{speed:,} | {row['peak_gigabytes']} | {row['train_loss']}"
        lines.append(f"| {row['base']} | {row['kept']} | {size:,} | {row['cuda_graph']} | {rest} |")
    return "\n".join(lines)


def test_the_page_on_performance_has_the_rows_of_a_gpu():
    text = page("docs/performance.md")
    assert f"<!-- table: gpu.csv -->\n\n{first_on_a_gpu()}\n\n<!-- end -->" in text
    assert f"<!-- table: gpu_prototype.csv -->\n\n{prototype_on_a_gpu()}\n\n<!-- end -->" in text
    assert prototype_on_a_gpu().count("\n") == 22


def test_the_page_on_performance_has_the_rows_of_fp8():
    from benchmarks.fp8 import table

    assert f"<!-- table: fp8.csv -->\n\n{table()}\n<!-- end -->" in page("docs/performance.md")
