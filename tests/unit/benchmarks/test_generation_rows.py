"""The benchmark of answers by rows: what it counts, and the whole command on a CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import generation, generation_rows
from benchmarks.generation_rows import Round, recordings, timed
from benchmarks.process import REPOSITORY


def test_rows_are_asked_for_on_a_card_and_on_request():
    assert generation.arguments([]).rows == []
    assert generation.arguments([]).work == ["nano", "a"]
    given = generation.arguments(["--device", "cuda"])
    assert (given.rows, given.work, given.new_tokens) == ([1, 64], ["mini"], 256)
    assert generation.arguments(["--rows", "2,8", "--work", "nano"]).rows == [2, 8]
    assert {work for work, _ in generation_rows.TARGETS} <= set(given.work)
    assert {rows for _, rows in generation_rows.TARGETS} == set(given.rows)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--rows", "0"], "--rows: '0' - expected numbers of at least 1"),
        (["--rows", "1", "--work", "a"], "--work: 'a' - expected some of nano, mini"),
        (["--work", "mini"], "--work: 'mini' - expected some of nano"),
    ],
)
def test_what_cannot_be_is_refused(line, said, capsys):
    with pytest.raises(SystemExit):
        generation.arguments(line)
    assert said in capsys.readouterr().err


def test_the_speed_of_a_step_is_that_of_the_difference(monkeypatch):
    clock = iter([0.0, 3.0, 3.0, 4.5])
    monkeypatch.setattr(generation_rows.time, "perf_counter", lambda: next(clock))
    found = timed(lambda questions, tokens: (["a"], 2 * tokens), [[]], 100)
    assert found == Round(["a"], 200, 3.0, 150, 1.5)
    assert found.step_speed == 100.0
    assert found._replace(step_seconds=-0.1).step_speed == 0.0


def test_recordings_that_fail_are_counted(monkeypatch):
    from philora.generation.static_decoding import StaticDecoder

    class Decoder:
        _recorded = None

    own = StaticDecoder._record
    monkeypatch.setattr(StaticDecoder, "_record", lambda decoder: None)
    with recordings() as found:
        assert str(found) == "no graph"
        made = Decoder()
        StaticDecoder._record(made)
        assert str(found) == "no CUDA graph in 1 of 1 answers"
        made._recorded = object()
        StaticDecoder._record(made)
        assert str(found) == "no CUDA graph in 1 of 2 answers"
        found.failed = 0
        assert str(found) == "a CUDA graph"
    monkeypatch.undo()
    assert StaticDecoder._record is own


@pytest.mark.slow
def test_the_whole_command_on_a_cpu():
    command = [sys.executable, "-m", "benchmarks.generation", "--quick", "--rows", "1", "--dtype", "float32"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "nano, 3 rows, 8 new tokens" in ended.stdout
    lines = [line for line in ended.stdout.splitlines() if "philora, merged" in line]
    assert [line.split()[-1] for line in lines] == ["1/1", "3/3"], "in fp32 all answers are transformers'"
