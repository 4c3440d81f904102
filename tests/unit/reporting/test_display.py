"""`philora.train` in a script shows what the command shows, and nothing where it is asked to be quiet."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from philora.evaluation.measures import Paired
from philora.generation.progress import advance
from philora.reporting import progress
from philora.reporting.display import LogLines, labelled_text, log_lines, print_whole, show_result, shown

SCRIPT = """
import sys, philora
if __name__ == "__main__":
    philora.train(
        {{
            "model": {{"name_or_path": "nano", "dtype": "float32"}},
            "data": {{"train": {{"path": "helpdesk", "limit": 24}}, "eval": {{"path": "helpdesk", "limit": 4}}}},
            "evaluation": {{"generate": 1, "max_new_tokens": 4}},
            "training_config": {{"output_dir": {folder!r}, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}},
        }},
        quiet={quiet},
    )
"""


def run(folder, quiet):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(folder), quiet=quiet)],
        capture_output=True, text=True, check=True, cwd=folder.parent,
    )  # fmt: skip


@pytest.mark.slow
def test_a_script_shows_plan_losses_and_result(tmp_path):
    done = run(tmp_path / "run", quiet=False)
    said = done.stderr
    assert "the plan:" in said
    assert "learning rate   0.0024 (auto:" in said
    assert "below about 20 an adapter learns little" in said
    assert "step 1/2  loss" in said, "progress goes to standard error, also in a pipe"
    assert re.search(r"step 1/2 .* s left", said)
    assert "step 1/2" not in done.stdout
    assert "better/same/worse" in done.stdout, "the figures have their intervals"
    assert "held-out data" in done.stdout
    assert f"report:  {tmp_path / 'run' / 'report.html'}" in done.stdout
    assert "FutureWarning" not in said
    assert "{'loss'" not in done.stdout, "transformers' own printer would show each entry twice"


@pytest.mark.slow
def test_a_quiet_script_shows_warnings_alone(tmp_path):
    done = run(tmp_path / "run", quiet=True)
    assert done.stdout == ""
    assert "the plan:" not in done.stderr
    assert "FutureWarning" not in done.stderr


@pytest.mark.parametrize(("level", "shows"), [("info", True), ("warning", False), ("passive", False), ("debug", True)])
def test_log_level_says_what_is_shown(level, shows):
    handler = log_lines(Console(), level)
    assert (handler.level <= logging.INFO) is shows
    assert handler.level <= logging.WARNING


def test_lines_that_somebody_shows_already_are_not_shown_twice():
    logger = logging.getLogger("philora")
    for left in [each for each in logger.handlers if isinstance(each, LogLines)]:  # by a command in this process
        logger.removeHandler(left)
    own = LogLines(Console(stderr=True))
    logger.addHandler(own)
    try:
        with shown("info"):
            assert [each for each in logger.handlers if isinstance(each, LogLines)] == [own]
    finally:
        logger.removeHandler(own)
    with shown("info"):
        assert sum(isinstance(each, LogLines) for each in logger.handlers) == 1
    assert not any(isinstance(each, LogLines) for each in logger.handlers)


TOKENS = [("<|user|>Hi", False), ("Hel", True), ("lo", True), ("<|end|>", False)]


def test_labels_are_marked_with_and_without_colour():
    coloured = Console(force_terminal=True, color_system="truecolor", no_color=False, _environ={})
    text, marks = labelled_text(coloured, TOKENS)
    assert text.plain == "<|user|>HiHello<|end|>"
    assert "green" in str(text.spans)
    assert marks == "the coloured tokens"
    for plain in (Console(file=io.StringIO()), Console(force_terminal=True, no_color=True)):
        text, marks = labelled_text(plain, TOKENS)
        assert text.plain == "<|user|>Hi>>Hello<<<|end|>"
        assert ">>" in marks


def test_no_figure_of_a_table_is_cropped_at_80_columns():
    console = Console(file=io.StringIO(), width=80)
    table = Table(*(f"a long heading {number}" for number in range(8)), box=None)
    table.add_row(*(f"{number}234567.891011" for number in range(8)))
    print_whole(console, table)
    shown_lines = console.file.getvalue().splitlines()
    assert all(f"{number}234567.891011" in shown_lines[1] for number in range(8))


def test_the_result_has_its_intervals(capsys, tmp_path):
    scores = {"loss": 2.0, "perplexity": 7.4, "token_accuracy": 0.5, "label_tokens": 9}
    loss = Paired("loss", "Loss", 2.0, 1.0, -1.2, -0.8, 20, 2, 1, higher_is_better=False)
    results = {"before": scores, "after": scores | {"loss": 1.0}, "start": None, "comparison": [loss.to_dict()]}
    results |= {"samples": [], "throughput": {"tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0}}
    show_result(tmp_path, results | {"memory": {"peak_bytes": 1}})
    assert re.search(r"Loss +2.000 +1.000 +−1.000 \[−1.200, −0.800\] +20/2/1", capsys.readouterr().out)


def test_a_long_evaluation_says_how_far_it_is_in_a_pipe(monkeypatch):
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with progress.evaluation_shown(console):
        for done in (1, 2, 3):
            advance("answers", done, 3)
    advance("answers", 1, 3)
    assert [line.partition(",")[0] for line in console.file.getvalue().splitlines()] == [
        "answers: 1 of 3",
        "answers: 2 of 3",
    ]


def test_a_long_evaluation_has_a_bar_on_a_terminal():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with progress.evaluation_shown(console):
        for done in (1, 2):
            advance("answers", done, 2)
    assert "answers" in console.file.getvalue()


def test_the_time_left_of_a_second_evaluation_does_not_count_the_training_between(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=100)
    shown = progress.EvaluationProgress(console)
    for begins in (0, 1000):
        for done in (79, 140, 276):
            now = begins + done / 2
            shown("rows scored", done, 276)
    lines = console.file.getvalue().splitlines()
    assert lines == ["rows scored: 140 of 276, 1 min 08 s left"] * 2
