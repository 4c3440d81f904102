"""Several real processes on one machine, over gloo: what one process would do, done once, ended together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import philora
from philora.evaluation import Evaluation, Sample, Scores, joined
from tests.cli.conftest import QUICK
from tests.tolerances import LOSS_STEP_FP32

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "philora"]


def settings_of(folder, **changes):
    """A run of a few steps whose micro-batch and accumulation are left to the plan."""
    settings = json.loads(json.dumps(QUICK))
    settings["data"] = {"train": {"path": "helpdesk", "limit": 70}, "eval": {"path": "helpdesk", "limit": 9}}
    settings["peft_config"]["lora_dropout"] = 0.0
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        del settings["training_config"][key]
    settings["training_config"] |= {"output_dir": str(folder), "tokens_per_step": 1024, "max_steps": 4, **changes}
    return settings


def launch(folder, settings, *arguments, launcher=TORCHRUN, **options):
    """Start the run in two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **options}
    return subprocess.Popen(
        [*launcher, "train", str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finished(process, seconds=240):
    """Exit code, standard output and standard error of a process."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def entries(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def losses(folder):
    return [entry["loss"] for entry in entries(folder)]


def largest_gap(mine, theirs):
    return max(abs(a - b) for a, b in zip(mine, theirs, strict=True))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same run in one process and in two, with what the two printed."""
    folder = tmp_path_factory.mktemp("processes")
    two = launch(folder, settings_of(folder / "two"))
    philora.train(settings_of(folder / "one"))
    code, out, err = finished(two)
    assert code == 0, err
    return folder, out, err


def test_two_processes_train_as_one(both):
    folder, out, err = both
    assert largest_gap(losses(folder / "two"), losses(folder / "one")) <= LOSS_STEP_FP32
    one, two = (json.loads((folder / name / "results.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["throughput"]["tokens"] == two["throughput"]["tokens"], "every process's tokens count"
    assert one["after"]["loss"] == pytest.approx(two["after"]["loss"], abs=LOSS_STEP_FP32)
    assert one["before"].keys() == two["before"].keys()
    assert one["before"]["label_tokens"] == two["before"]["label_tokens"]
    assert one["before"]["answers"] == two["before"]["answers"] == 4
    assert len(entries(folder / "two")) == 4, "each step is written once"
    assert out.count("step 4/4") == 1
    assert err.count("evaluating before training") == 1
    assert "in each of 2 processes" in err
    assert (folder / "two" / "train.log").read_text().count("evaluating before training") == 1
    kept = sorted(each.name for each in (folder / "two" / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]


def test_another_share_shows(both, tmp_path):
    """The comparison of losses can fail: a step of half as many rows has others."""
    folder, _, _ = both
    philora.train(settings_of(tmp_path / "half", tokens_per_step=512))
    assert largest_gap(losses(tmp_path / "half"), losses(folder / "two")) > 10 * LOSS_STEP_FP32


def test_parts_of_an_evaluation_are_joined_by_their_labels():
    sample = Sample([{"role": "user", "content": "a"}], "b", "b", matched=True, stopped=True, tokens=1)
    parts = [
        Evaluation(Scores(1.0, 2.7, 0.5, 30, 1.0, 1, 1), [sample], 1.0),
        Evaluation(Scores(4.0, 54.6, 0.2, 10, None, 0, 0), [], 2.0, too_long=1),
        Evaluation(Scores(float("nan"), float("nan"), float("nan"), 0), [], 0.0),
    ]
    whole = joined(parts)
    assert whole.scores.loss == pytest.approx(1.75)
    assert whole.scores.token_accuracy == pytest.approx(0.425)
    assert (whole.scores.label_tokens, whole.scores.answers, whole.scores.exact_match) == (40, 1, 1.0)
    assert (whole.seconds, whole.too_long, whole.samples) == (2.0, 1, [sample])
