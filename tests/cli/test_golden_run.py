"""Runs that earlier releases wrote are opened by every command, from another place than they were trained in."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = sorted(each.name for each in GOLDEN.glob("*-run*"))
sys.path.insert(0, str(GOLDEN))
from make_run import conversations  # noqa: E402 - beside the runs


@pytest.fixture(params=RUNS)
def golden(request, tmp_path, monkeypatch):
    """A copy of a golden run on another machine; of one that kept no rows, with its data at its place beside it."""
    run = tmp_path / "brought" / "runs" / "golden"
    shutil.copytree(GOLDEN / request.param, run)
    if not (run / "held_out.jsonl").exists():
        (tmp_path / "brought" / "conversations.jsonl").write_text(conversations(), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return run


def test_there_is_a_run_with_and_one_without_its_rows():
    assert {(GOLDEN / name / "held_out.jsonl").exists() for name in RUNS} == {True, False}
    assert sum(each.stat().st_size for name in RUNS for each in (GOLDEN / name).rglob("*") if each.is_file()) < 300_000


def test_its_figures_are_those_of_the_day(cli, golden):
    answer = cli("evaluate", golden, "--no-forgetting", "--json")
    assert answer.code == 0, answer.err
    found, then = json.loads(answer.out), json.loads((golden / "expected.json").read_text())
    rows = [json.loads(line) for line in (golden / "evaluation" / "examples.jsonl").read_text().splitlines()]
    assert [each["label_tokens"] for each in rows] == [each["label_tokens"] for each in then["rows"]]
    for name in ("before", "after"):
        assert found[name]["loss"] == pytest.approx(then[name]["loss"], rel=1e-5)  # fp32, another machine's sums
        assert found[name]["label_tokens"] == then[name]["label_tokens"]
    assert found["before"]["loss"] != pytest.approx(found["after"]["loss"], rel=1e-3)
    assert found["training_rows_known"] is True
    kept = (golden / "held_out.jsonl").exists()
    assert ("its rows are taken from its data again" in answer.err) is not kept


@pytest.mark.slow
def test_every_command_opens_it(cli, golden, tmp_path, monkeypatch):
    Path("prompts.txt").write_text("Say green 5.\n")
    answer = cli("generate", golden, "--prompts", "prompts.txt", "--max-new-tokens", "4")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["tokens"] >= 1
    for words in (
        ("report", golden),
        ("merge", golden, "--out", "merged"),
        ("export", golden, "--format", "peft", "--out", "exported"),
        ("push", golden, "me/golden", "--dry-run"),
    ):
        done = cli(*words)
        assert done.code == 0, (words, done.err)
    page = (golden / "report.html").read_text()
    assert "conversations.jsonl" in page
    assert (tmp_path / "elsewhere" / "merged" / "model.safetensors").exists()


def test_it_can_be_talked_to(cli, golden, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("Say green 5.\n"))
    answer = cli("chat", golden, "--max-new-tokens", "4")
    assert answer.code == 0, answer.err
    assert answer.out.strip()


def test_the_code_of_its_model_card_runs(golden, monkeypatch, capsys):
    monkeypatch.chdir(golden)
    card = (golden / "adapter" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    own = 'AutoTokenizer.from_pretrained("adapter")'
    assert own in code
    code = code.replace(own, 'AutoTokenizer.from_pretrained(local_path("nano"))')  # the golden run is kept without it
    exec(compile(code.replace("max_new_tokens=128", "max_new_tokens=4"), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
