"""Runs that resume exactly, stop in good order and lose nothing: a model of one narrow layer, a second a run."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from rich.console import Console
from transformers import TrainerCallback

import philora
from philora.errors import ConfigError, RunError
from philora.files import checkpoint
from philora.planning import plan as planning
from philora.reporting.progress import ProgressBar
from philora.runtime.signals import Interrupted
from philora.training.callbacks import StepWatch
from philora.training.nonfinite import NonFiniteError

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("torture", ROOT / "tools" / "torture.py")
torture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torture)
STEPS = torture.STEPS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return torture.make_model(tmp_path_factory.mktemp("model"))


def settings_of(model, folder, **changes):
    settings = torture.settings_of(model, folder, changes.pop("dtype", "float32"))
    settings["training_config"] |= changes
    return settings


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run that nothing interrupts, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    philora.train(settings_of(model, folder, save_total_limit=None))
    return folder


def back_to(whole, step, folder):
    """A copy of a run as it was when a checkpoint had been written and nothing after it."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("adapter", "results.json", ".lock"))
    for each in (folder / "checkpoints").glob("checkpoint-*"):
        if int(each.name.partition("-")[2]) > step:
            shutil.rmtree(each)
    config = (folder / "config.yaml").read_text().replace(str(whole), str(folder))
    (folder / "config.yaml").write_text(config)
    return folder


class Listening(TrainerCallback):
    """Calls a function on one event of training."""

    def __init__(self, event, act):
        setattr(self, f"on_{event}", lambda args, state, control, **given: act(state, **given))


def goes_on(model, folder, resume=True, callbacks=(), **changes):
    return philora.train(settings_of(model, folder, save_total_limit=None, **changes), resume=resume,
                         callbacks=list(callbacks))  # fmt: skip


# ------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("step", [3, STEPS - 1, STEPS])  # between two log entries, before and after the last step
def test_a_resumed_run_ends_as_the_whole_one(model, whole, tmp_path, step):
    folder = back_to(whole, step, tmp_path / "run")
    begun, bar = [], ProgressBar(Console(file=io.StringIO(), force_terminal=True))

    def begins(state, **_):
        (task,) = bar._progress.tasks
        begun.append((state.global_step, task.completed, task.total))

    goes_on(model, folder, callbacks=[bar, Listening("train_begin", begins)])
    assert begun == [(step, step, STEPS)]
    assert torture.differences(torture.outcome(folder), torture.outcome(whole)) == []


def test_the_comparison_of_runs_can_fail(model, whole, tmp_path):
    folder = back_to(whole, 3, tmp_path / "run")
    generators = folder / "checkpoints" / "checkpoint-3" / "rng_state.pth"
    states = torch.load(generators, weights_only=False)
    states["cpu"] = torch.Generator().manual_seed(1).get_state()
    torch.save(states, generators)
    checkpoint.seal(generators.parent)
    goes_on(model, folder)
    assert "adapter" in torture.differences(torture.outcome(folder), torture.outcome(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"packing": False},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": "elementwise"},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_num_workers": 1},
        {"logging_steps": 3, "save_steps": 2},
    ],
    ids=str,
)
def test_other_runs_go_on_exactly_too(model, tmp_path, changes):
    whole = tmp_path / "whole"
    philora.train(settings_of(model, whole, save_total_limit=None, **changes))
    folder = back_to(whole, 6, tmp_path / "run")
    goes_on(model, folder, **changes)
    assert torture.differences(torture.outcome(folder), torture.outcome(whole)) == []


@pytest.mark.slow
def test_bf16_and_early_stopping_go_on_exactly(model, tmp_path):
    changes = {
        "dtype": "bfloat16", "early_stopping_patience": 2, "eval_steps": 1, "save_steps": 1, "learning_rate": 1e-7,
        "metric_for_best_model": "eval_mean_token_accuracy", "greater_is_better": True,
    }  # fmt: skip
    whole = tmp_path / "whole"
    result = philora.train(settings_of(model, whole, save_total_limit=None, **changes))
    last = result.results["throughput"]["steps"]
    assert last < STEPS, "nothing improves at this rate, so it stops early"
    for step in (last - 1, last):
        folder = back_to(whole, step, tmp_path / f"run-{step}")
        again = goes_on(model, folder, **changes)
        assert again.results["throughput"]["steps"] == last
        assert again.results["throughput"]["tokens"] == result.results["throughput"]["tokens"]
        assert again.results["train_loss"] == result.results["train_loss"]
        name = Path("adapter") / "adapter_model.safetensors"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_what_was_chosen_is_used_again(model, tmp_path, monkeypatch):
    open_ended = {"per_device_train_batch_size": "auto", "gradient_checkpointing": "auto", "tokens_per_step": 512}
    settings = settings_of(model, tmp_path / "run", **open_ended, save_total_limit=None)
    del settings["training_config"]["gradient_accumulation_steps"]
    before = torch.get_num_threads()
    philora.train(settings)
    chosen = json.loads((tmp_path / "run" / "run.json").read_text())["chosen"]
    newest = tmp_path / "run" / "checkpoints" / f"checkpoint-{STEPS}"
    assert checkpoint.read_json(newest / checkpoint.STATE_NAME)["chosen"] == chosen
    assert chosen["threads"] == before
    shutil.rmtree(newest)
    monkeypatch.setattr(planning, "available_bytes", lambda *_: 1)  # a machine with other memory, and other threads
    seen = []
    torch.set_num_threads(before + 1)
    try:
        philora.train(settings, resume=True, callbacks=[
            Listening("step_begin", lambda state, **_: seen.append(torch.get_num_threads()))
        ])  # fmt: skip
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {before}
    assert checkpoint.read_json(newest / checkpoint.STATE_NAME)["chosen"] == chosen


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.slow
def test_other_data_and_another_model_are_refused(model, whole, jsonl, tmp_path):
    settings = settings_of(model, tmp_path / "run", max_steps=2, save_total_limit=None)
    other = tmp_path / "model"
    shutil.copytree(model, other)
    settings["model"]["name_or_path"] = str(other)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    records = [{"messages": [{**turns[0], "content": f"question {n}"}, turns[1]]} for n in range(30)]
    settings["data"]["train"] = str(jsonl(records))
    philora.train(settings)
    jsonl(records[:-1])
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError) as caught:
        philora.train(settings, resume=True)
    text = str(caught.value)
    assert "model.model.safetensors=" in text
    assert (
        "data.rows.train=29 - expected the value that the run was started with: 30. --resume=force continues anyway"
        in text
    )
    assert philora.train(settings, resume="force").results["throughput"]["steps"] == 2


# ---------------------------------------------------------------------------------------------------- signals


def send(number=signal.SIGTERM):
    return lambda *_, **__: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "event",
    ["step_begin", "save", *(pytest.param(name, marks=pytest.mark.slow) for name in ("prediction_step", "log"))],
)
def test_a_signal_saves_the_step_whenever_it_comes(model, whole, tmp_path, event):
    folder, sent = tmp_path / "run", []

    def once(state, **_):
        if state.global_step >= 3 and not sent:
            sent.append(state.global_step)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        Interrupted, match=r"SIGTERM: stopped after step (\d+) of 8; checkpoint-\1 .* Continue with: "
    ) as at:
        goes_on(model, folder, resume=False, callbacks=[Listening(event, once)])
    step = int(str(at.value).split("step ")[1].split()[0])
    assert step - sent[0] == (event == "step_begin"), "no further step is made"
    assert checkpoint.newest_complete(folder / "checkpoints").folder.name == f"checkpoint-{step}"
    goes_on(model, folder)
    assert torture.differences(torture.outcome(folder), torture.outcome(whole)) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, STEPS])  # in the middle of training, and at its end
def test_a_signal_ends_an_evaluation_which_is_made_again(model, whole, tmp_path, step):
    folder, seen = tmp_path / "run", []

    def at_batch(state, **_):
        if state.global_step == step:
            seen.append(step)
            os.kill(os.getpid(), signal.SIGTERM)

    for turn in (1, 2):  # the run that goes on is stopped there too
        with pytest.raises(Interrupted, match=rf"SIGTERM: stopped after step {step} of 8; checkpoint-{step} is saved"):
            goes_on(model, folder, resume=turn == 2, callbacks=[Listening("prediction_step", at_batch)])
        assert len(seen) == turn, "no further batch"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert step not in [each["step"] for each in lines if "eval_loss" in each]
    goes_on(model, folder)
    assert torture.differences(torture.outcome(folder), torture.outcome(whole)) == []


@pytest.mark.slow
def test_the_end_of_an_epoch_is_made_up_for(model, tmp_path):
    """Each step is saved before its epoch ends; there, and only there, this run logs and evaluates."""
    by_epoch = {"eval_strategy": "epoch", "logging_strategy": "epoch", "eval_steps": None}
    whole = tmp_path / "whole"
    philora.train(settings_of(model, whole, save_total_limit=None, **by_epoch))
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    ends = [each["step"] for each in lines if "eval_loss" in each]
    assert len(ends) > 1
    folder = tmp_path / "run"
    # Before the end of the first epoch, in its evaluation when it is made up for, and before the end of the last one.
    for event, step in (("save", ends[0]), ("prediction_step", ends[0]), ("save", STEPS)):

        def at(state, step=step, **_):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(Interrupted, match=f"SIGTERM: stopped after step {step} of 8"):
            goes_on(model, folder, resume=folder.exists(), callbacks=[Listening(event, at)], **by_epoch)
    goes_on(model, folder, **by_epoch)
    # The last checkpoint was written again after what was made up for.
    differs = set(torture.differences(torture.outcome(folder), torture.outcome(whole)))
    assert differs == {"rng_state.pth", "history"}


@pytest.mark.slow
def test_a_real_signal_in_an_evaluation(model, tmp_path):
    settings = settings_of(model, tmp_path / "run", eval_steps=1, logging_steps=1, max_steps=2, save_steps=2)
    settings["data"]["eval"]["limit"] = 200
    settings["training_config"] |= {"per_device_eval_batch_size": 1, "packing": False}
    path, metrics = tmp_path / "config.json", tmp_path / "run" / "metrics.jsonl"
    path.write_text(json.dumps(settings))
    run = subprocess.Popen([sys.executable, "-m", "philora", "train", str(path)], stderr=subprocess.PIPE, text=True)
    try:
        while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.005)
        time.sleep(0.05)  # the line of the step is written; its evaluation of 200 batches begins
        run.send_signal(signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 3
    assert "SIGTERM: stopped after step 1 of 2; checkpoint-1 is saved" in " ".join(said.split())
    assert f"philora train {path} --resume" in " ".join(said.split())
    assert "eval_loss" not in metrics.read_text()
    philora.train(settings, resume=True)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [(each["step"], "eval_loss" in each) for each in lines][:4] == [(1, False), (1, True), (2, False), (2, True)]


@pytest.mark.slow
def test_a_signal_before_training_ends_at_once(model, tmp_path, monkeypatch):
    from philora.training import run as training
    from philora.training import run_evaluation

    folder = tmp_path / "run"
    prepare = training.prepare
    monkeypatch.setattr(training, "prepare", lambda *given, **more: (send()(), prepare(*given, **more)))
    with pytest.raises(Interrupted, match=r"SIGTERM: stopped before training. Nothing was saved; start it"):
        philora.train(settings_of(model, folder))
    assert not folder.exists()
    monkeypatch.setattr(training, "prepare", prepare)
    monkeypatch.setattr(run_evaluation, "evaluate", send(signal.SIGINT))
    with pytest.raises(Interrupted, match=r"SIGINT: stopped before training. Nothing was saved; start it"):
        philora.train(settings_of(model, folder))
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert philora.train(settings_of(model, folder), resume=True).results["throughput"]["steps"] == STEPS


@pytest.mark.slow
def test_a_signal_after_training_loses_none_of_it(model, whole, tmp_path, monkeypatch):
    from philora.training import run_evaluation

    folder, evaluate, calls = tmp_path / "run", run_evaluation.evaluate, []

    def second(*given, **more):
        calls.append(1)
        return send()() if len(calls) == 2 else evaluate(*given, **more)

    monkeypatch.setattr(run_evaluation, "evaluate", second)
    with pytest.raises(Interrupted, match=r"SIGTERM: stopped after training. Continue with: .* --resume"):
        goes_on(model, folder, resume=False)
    assert not (folder / "results.json").exists()
    monkeypatch.undo()
    goes_on(model, folder)
    assert torture.differences(torture.outcome(folder), torture.outcome(whole)) == []


@pytest.mark.slow
def test_the_evaluation_on_start_is_not_made_again(model, tmp_path):
    folder = tmp_path / "run"

    def at_third(state, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped after step 3 of 8"):
        goes_on(model, folder, resume=False, callbacks=[Listening("step_end", at_third)], eval_on_start=True)
    goes_on(model, folder, eval_on_start=True)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps.count(0) == 1
    assert steps == sorted(steps)


def test_a_signal_while_the_command_loads(cli, monkeypatch, tmp_path):
    class Loading:
        def __getattr__(self, name):
            if name.startswith("__"):  # the import system's own questions
                raise AttributeError(name)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setitem(sys.modules, "philora.reporting.progress", Loading())
    answer = cli("demo", "--out", tmp_path / "run", "peft_config.r=4")
    assert answer.code == 143
    said = " ".join(answer.err.split())
    assert "SIGTERM: stopped while loading. Nothing was saved; start it again with: philora train demo" in said
    assert f"training_config.output_dir={tmp_path / 'run'} peft_config.r=4" in said


def test_a_second_signal_stops_at_once():
    code = (
        "import os, signal, time\n"
        "from philora.runtime.signals import StopOnSignal\n"
        "with StopOnSignal('x', 'y') as stop, stop.finishing():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print(stop.stopped_by, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(5); print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "SIGTERM\n")


# ------------------------------------------------------------------------------- losses that are not finite


def spoil(steps):
    """A callback that makes the loss of some optimizer steps not a number, by a weight of the adapter."""

    class Spoil(TrainerCallback):
        held = None

        def on_step_begin(self, args, state, control, model=None, **_):
            weight = next(each for name, each in model.named_parameters() if "lora_A" in name)
            if state.global_step + 1 in steps:
                self.held = weight.detach().clone()
                weight.data.fill_(float("nan"))

        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            if self.held is not None:
                weight = next(each for name, each in model.named_parameters() if "lora_A" in name)
                weight.data.copy_(self.held)
                self.held = None

    return Spoil()


def test_a_step_that_is_not_finite_is_left_out(model, whole, tmp_path, caplog):
    folder, rates, weights = tmp_path / "run", {}, {}

    def note(state, model=None, lr_scheduler=None, **_):
        rates[state.global_step] = lr_scheduler.last_epoch
        weights[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}

    result = goes_on(model, folder, resume=False, callbacks=[spoil({4, 5}), Listening("step_end", note)])
    assert all(torch.equal(weights[3][name], weights[5][name]) for name in weights[3])
    assert rates[5] == rates[3] == 3, "the schedule of the learning rate waits"
    assert not all(torch.equal(weights[5][name], weights[6][name]) for name in weights[5])
    assert result.results["throughput"]["steps"] == STEPS, "the data continues"
    assert "step 5 is skipped: loss nan, gradient norm nan; 2 in a row, 2 in all" in caplog.text
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [each["nonfinite_steps"] for each in lines if "nonfinite_steps" in each] == [1, 2, 2]
    state = checkpoint.read_json(folder / "checkpoints" / "checkpoint-5" / checkpoint.STATE_NAME)
    assert (state["watch"]["in_a_row"], state["watch"]["total"]) == (2, 2)


@pytest.mark.slow
def test_too_many_in_a_row_stop_the_run_and_name_the_examples(model, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(
        NonFiniteError, match=r"step 5: .*loss nan.* in 2 steps. .*nonfinite_examples.json.*checkpoint-4"
    ):
        goes_on(model, folder, resume=False, callbacks=[spoil({4, 5, 6})], max_nonfinite_steps=2)
    written = json.loads((folder / "checkpoints" / "nonfinite_examples.json").read_text())
    assert written["step"] == 5
    examples = [example for batch in written["micro_batches"] for example in batch["examples"]]
    assert len(written["micro_batches"]) == 2
    for example in examples:
        file, _, line = example["source"].rpartition(":")
        record = json.loads(Path(file).read_text().splitlines()[int(line) - 1])
        assert record["messages"][-1]["content"] == example["conversation"][-1]["content"]
        assert example["row"] is not None
    newest = checkpoint.newest_complete(folder / "checkpoints").folder
    saved = checkpoint.read_peft_tensors(newest)
    assert newest.name == "checkpoint-4"
    assert saved
    with pytest.raises(NonFiniteError):  # the counters continue too: one more is one too many
        goes_on(model, folder, callbacks=[spoil({5})], max_nonfinite_steps=2)


@pytest.mark.slow
def test_none_takes_the_steps_as_trl_does(model, tmp_path):
    goes_on(model, tmp_path / "run", resume=False, callbacks=[spoil({2})], max_nonfinite_steps=None, max_steps=3)
    tensors = philora.lora.state.read_state(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any(each.isnan().any() for each in tensors.values())


def test_a_loss_that_jumps_is_reported_once():
    watch = StepWatch()
    for each in range(25):
        assert watch.spike(2.0 + 0.01 * (each % 5)) is None
    again = StepWatch()
    again.restore(json.loads(json.dumps(watch.state())))
    assert watch.spike(5.0) == pytest.approx(2.02)
    assert again.spike(5.0) == pytest.approx(2.02)
    assert watch.spike(5.0) is None, "it continues, and was said"
    assert watch.spike(2.0) is None
    assert watch.spikes == 1


# --------------------------------------------------------------------------------------- folders and disks


def sealed(folder, text="x"):
    folder.mkdir(parents=True)
    (folder / "a").write_text(text)
    checkpoint.seal(folder)
    return folder


def test_rotation_never_removes_the_newest_whole_one(tmp_path):
    for step in (20, 30, 40):
        sealed(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-40" / "a").write_text("torn")  # ahead, passed over when the run went back to 20
    checkpoint.rotate(tmp_path, tmp_path / "checkpoint-30", 1)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoint-30", "checkpoint-40"]
    shutil.rmtree(tmp_path / "checkpoint-40")
    for step in (40, 50):
        sealed(tmp_path / f"checkpoint-{step}")
    checkpoint.rotate(tmp_path, tmp_path / "checkpoint-50", 2, best=tmp_path / "checkpoint-30")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["checkpoint-30", "checkpoint-50"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path, monkeypatch):
    final, new = sealed(tmp_path / "checkpoint-2"), sealed(tmp_path / ".saving-1-checkpoint-2", "new")
    rename = Path.rename

    def killed(self, target):
        if self == new:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.publish(new, final)
    monkeypatch.undo()
    assert not final.exists()
    checkpoint.remove_leftovers(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["checkpoint-2"]
    assert not checkpoint.faults_of(final)


@pytest.mark.slow
def test_a_worker_that_outlives_its_run_holds_no_lock(tmp_path):
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from philora.files.checkpoint import run_lock\n"
        "with run_lock(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: time.sleep(20); os._exit(0)\n"
        "    print('held', flush=True); time.sleep(20)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert run.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="no other run"), checkpoint.run_lock(tmp_path):
            pass
        run.kill()
        run.wait()
        with checkpoint.run_lock(tmp_path), (tmp_path / ".lock").open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),  # torch.save, where its archive met the full disk
        (RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), True),
        (OSError(13, "Permission denied"), False),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_what_says_that_a_disk_is_full(error, full):
    assert checkpoint.disk_full(error) is full


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("numbers", [1, 1000, 1_000_000])
def test_what_torch_says_of_a_full_disk_is_understood(numbers):
    with pytest.raises(RuntimeError) as error:
        torch.save({"state": torch.zeros(numbers)}, "/dev/full")
    assert checkpoint.disk_full(error.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_what_numpy_says_of_a_full_disk_is_understood():
    with Path("/dev/full").open("wb", buffering=0) as file, pytest.raises(OSError, match="requested and") as error:
        np.zeros(1_000_000).tofile(file)  # as gguf writes its tensors
    assert error.value.errno is None
    assert checkpoint.disk_full(error.value)


def test_an_error_about_another_error_says_that_a_disk_is_full():
    error = RuntimeError("the file cannot be closed")
    error.__context__ = OSError(28, "No space left on device")
    assert checkpoint.disk_full(error)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(
        RunError, match=r"free space for about [\d,]+ bytes: checkpoints of [\d,]+ bytes.* Free [\d,]+ bytes"
    ):
        philora.train(settings_of(model, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_room_is_looked_for_before_each_checkpoint(model, tmp_path, monkeypatch):
    written, save = [], trl.SFTTrainer._save_checkpoint
    monkeypatch.setattr(trl.SFTTrainer, "_save_checkpoint", lambda *given: (written.append(1), save(*given)))

    def fills(state, **_):
        if state.global_step == 2:
            monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))

    with pytest.raises(
        RunError, match=r"checkpoint-3' - expected free space for about [\d,]+ bytes.*1,000 bytes are free"
    ):
        goes_on(model, tmp_path / "run", resume=False, callbacks=[Listening("save", fills)])
    assert len(written) == 2, "nothing was written of the third"
    assert checkpoint.newest_complete(tmp_path / "run" / "checkpoints").folder.name == "checkpoint-2"


# --------------------------------------------------------------------------------------- files from outside


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_in_a_checkpoint_is_executed(model, whole, tmp_path, name):
    folder, mark = back_to(whole, 3, tmp_path / "run"), tmp_path / "executed"
    newest = folder / "checkpoints" / "checkpoint-3"
    (newest / name).write_bytes(pickle.dumps(Evil(mark)))
    (newest / "training_args.bin").write_bytes(pickle.dumps(Evil(mark)))
    checkpoint.seal(newest)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        goes_on(model, folder)
    assert not mark.exists()
    pickle.loads((newest / name).read_bytes())  # and it would have been
    assert mark.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..\\outside", "C:\\x", "a/../../outside"])
def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path, name):
    folder = sealed(tmp_path / "checkpoint-1")
    (tmp_path / "outside").write_text("x")
    content = json.loads((folder / checkpoint.MANIFEST_NAME).read_text())
    content = {"format": 1, "files": {**content["files"], name: {"bytes": 1, "sha256": "x"}}}
    (folder / checkpoint.MANIFEST_NAME).write_text(json.dumps(content))
    assert checkpoint.faults_of(folder) == [f"{name} lies outside the folder"]


# ---------------------------------------------------------------------------------------------- the script


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_the_short_form_of_the_torture(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tools" / "torture.py"), "--kills", "2", "--signals", "2", "--races", "1",
               "--foreign", "1", "--disks", "1", "--damage", "--fuzz", "25",
               "--seed", str(int(time.time()) % 1000)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["killed with SIGKILL, resumed"]["number"] == 2
    assert found["stopped with SIGTERM or SIGINT"]["number"] == 2
    assert found["two runs in one folder"]["number"] == 1
    assert found["foreign files in checkpoints"]["number"] == 1
    assert found["checkpoint files damaged"]["number"] > 50
    assert found["adapter reader fuzzed"]["number"] >= 25
