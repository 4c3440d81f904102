"""`philora.train` in a script shows what the command shows, and nothing where it is asked to be quiet."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from rich.console import Console

from philora.reporting.display import LogLines, log_lines, shown

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


def test_a_script_shows_plan_losses_and_result(tmp_path):
    done = run(tmp_path / "run", quiet=False)
    said = done.stderr
    assert "the plan:" in said
    assert "learning rate   0.0024 (auto:" in said
    assert "below about 20 an adapter learns little" in said
    assert "step 1/2  loss" in done.stdout
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
