"""What a run needs is found before it begins; who comes second takes nothing away; foreign files hurt nothing."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import pwd
import resource
import shutil
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from transformers import TrainerCallback

import philora
from philora.configuration.config import load_config
from philora.errors import AdapterError, ConfigError, ModelError, PhiloraError, RunError
from philora.files import checkpoint
from philora.kernels import memory
from philora.models import loading as models
from philora.planning import plan as planning
from philora.runtime import user_cache
from philora.runtime.signals import Interrupted
from philora.training import callbacks, run_evaluation
from philora.training import run as training
from philora.training.readiness import preflight
from philora.training.resume import Claim

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("torture", ROOT / "tools" / "torture.py")
torture = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(torture)
STEPS = torture.STEPS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return torture.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(model, tmp_path):
    """A run of two steps in a folder below one that is not there yet."""
    given = torture.settings_of(model, tmp_path / "runs" / "run")
    given["training_config"] |= {"max_steps": 2, "eval_strategy": "no"}
    return given


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A run of four steps with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    philora.train(short(model, folder))
    return folder


def short(model, folder, **changes):
    given = torture.settings_of(model, folder)
    given["training_config"] |= {"max_steps": 4, "eval_strategy": "no", "save_total_limit": None, **changes}
    return given


def back_to(whole, step, folder):
    """A copy of a run as it was when a checkpoint had been written and nothing after it."""
    results = ("results.json", "train_results.json", "eval_results.json", "report.html", "answers.jsonl")
    end = ("adapter", *results, ".lock")
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns(*end))
    for each in (folder / "checkpoints").glob("checkpoint-*"):
        if int(each.name.partition("-")[2]) > step:
            shutil.rmtree(each)
    config = (folder / "config.yaml").read_text().replace(str(whole), str(folder))
    (folder / "config.yaml").write_text(config)
    return folder


class At(TrainerCallback):
    """Calls a function on one event of training."""

    def __init__(self, event, act):
        setattr(self, f"on_{event}", lambda args, state, control, **given: act(state))


def content(folder):
    return {
        each.relative_to(folder).as_posix(): each.read_bytes()
        for each in folder.rglob("*")
        if each.is_file() and each.name not in (checkpoint.LOCK_NAME, "train.log")
    }


# ------------------------------------------------------------------------------------------- two runs, one folder


def test_the_second_of_two_runs_takes_nothing_away(settings, tmp_path, monkeypatch):
    """The order is forced: the second has seen the folder free, then the first has it, then the second locks it."""
    folder, ready, notes = tmp_path / "runs" / "run", tmp_path / "ready", tmp_path / "notes"
    lock = checkpoint.run_lock

    def late(place):
        ready.touch()
        torture.until((folder / "config.yaml").exists)
        return lock(place)

    def second():
        monkeypatch.setattr(checkpoint, "run_lock", late)
        torture.run(settings, False, notes)

    child = torture.forked(second, notes)
    torture.until(ready.exists)
    codes = []
    result = philora.train(settings, callbacks=[At("train_begin", lambda _: codes.append(torture.ended(child)))])
    assert codes == [1]
    assert "expected a folder that no other run is writing to" in notes.read_text()
    assert {"config.yaml", "train.log", "results.json", ".lock"} <= {each.name for each in folder.iterdir()}
    assert philora.train(settings, resume=True).results["before"] == result.results["before"]


def test_a_lock_file_that_was_removed_is_made_again(tmp_path, monkeypatch):
    """Who locks a file that has lost its name would share the folder with who makes the next one."""
    folder, lock, times = tmp_path, checkpoint._lock, []

    def slow(descriptor):
        times.append(1)
        if len(times) == 1:
            (folder / checkpoint.LOCK_NAME).unlink()
        lock(descriptor)

    monkeypatch.setattr(checkpoint, "_lock", slow)
    with checkpoint.run_lock(folder):
        assert len(times) == 2
        with pytest.raises(ConfigError, match="no other run"), checkpoint.run_lock(folder):
            pass


@pytest.mark.parametrize("there", [(), ("runs",), ("runs", "runs/run")])
def test_a_run_that_does_not_begin_removes_what_it_made_and_nothing_else(settings, tmp_path, monkeypatch, there):
    for each in there:
        (tmp_path / each).mkdir()
    before = sorted(tmp_path.rglob("*"))

    def fails(*given, **more):
        assert (tmp_path / "runs" / "run" / checkpoint.LOCK_NAME).exists()
        raise ModelError("no model")

    monkeypatch.setattr(training.models, "load_model", fails)
    with pytest.raises(ModelError, match="no model"):
        philora.train(settings)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_somebody_else_removes_or_fills_meanwhile(settings, tmp_path):
    config = load_config(settings)
    folder = tmp_path / "runs" / "run"
    with ExitStack() as held:
        Claim(folder).take(config.source, held)
        (folder / "notes.txt").write_text("mine")
    assert [each.name for each in folder.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match=r"this one holds other files. Give another"), ExitStack() as held:
        Claim(folder).take(config.source, held)
    assert [each.name for each in folder.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", [".DS_Store", "._x", ".nfs0001", "Thumbs.db", "desktop.ini"])
def test_what_file_managers_leave_does_not_take_a_folder(settings, tmp_path, name):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / name).touch()
    with ExitStack() as held:
        Claim(folder).take(load_config(settings).source, held)
    assert [each.name for each in folder.iterdir()] == [name]


def test_a_configuration_of_ones_own_in_the_folder_is_not_replaced(settings, tmp_path):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("mine: 1")
    with pytest.raises(ConfigError, match=r"this one holds another run. Give another training_config.output_dir"):
        philora.train(settings)
    assert (folder / "config.yaml").read_text() == "mine: 1"


# ------------------------------------------------------------------------------------- checkpoints that are not whole


def test_foreign_files_change_nothing_and_are_told(model, whole, tmp_path, caplog):
    folder = back_to(whole, 3, tmp_path / "run")
    for each in (folder / "checkpoints").glob("checkpoint-*"):
        (each / ".DS_Store").write_text("x")
        (each / "notes").mkdir()
        (each / "notes" / "why.txt").write_text("x")
    begun = []
    caplog.set_level(logging.WARNING)
    philora.train(
        short(model, folder), resume=True, callbacks=[At("train_begin", lambda state: begun.append(state.global_step))]
    )
    assert begun == [3]
    assert "checkpoint-3 has .DS_Store, notes/why.txt, which does not belong to the run" in caplog.text
    name = Path("adapter") / "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_again(model, whole, tmp_path):
    folder = back_to(whole, 2, tmp_path / "run")
    for each in (folder / "checkpoints").glob("checkpoint-*"):
        (each / "optimizer.pt").write_bytes(b"x")
    before = content(folder)
    for resume in (True, "force"):
        with pytest.raises(
            ConfigError, match=r"a complete checkpoint; none of its 2 is\. checkpoint-2: optimizer.pt has"
        ):
            philora.train(short(model, folder), resume=resume)
    assert content(folder) == before
    (folder / "checkpoints").rename(tmp_path / "aside")  # as the message says
    assert philora.train(short(model, folder, max_steps=1)).results["throughput"]["steps"] == 1


def test_a_complete_run_without_checkpoints_is_not_trained_again(model, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    before = content(folder)
    given = short(model, folder)
    with pytest.raises(ConfigError, match="this one has an adapter and no checkpoints"):
        philora.train(given, resume="force")
    with pytest.raises(ConfigError, match=r"holds another run. Open it with philora.load\(.*, or give another"):
        philora.train(given)
    assert content(folder) == before


def test_what_was_passed_over_stays(model, whole, tmp_path, caplog):
    """Neither the limit of checkpoints nor a checkpoint of the same step takes it away."""
    folder = back_to(whole, 3, tmp_path / "run")
    damaged = folder / "checkpoints" / "checkpoint-3"
    (damaged / "rng_state.pth").write_bytes(b"x")
    before = content(damaged)
    philora.train(short(model, folder, save_total_limit=1), resume="force")
    aside = folder / "checkpoints" / "passed-over-checkpoint-3"
    assert content(aside) == before
    assert [each.name for each in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]
    assert "passed-over-checkpoint-3; delete it if" in caplog.text


def test_what_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "a").write_text("x")
        checkpoint.seal(tmp_path / f"checkpoint-{step}")
    digest = checkpoint._digest

    def fails(path):
        if path.parent.name == "checkpoint-2":
            raise OSError(errno.EIO, "Input/output error")
        return digest(path)

    monkeypatch.setattr(checkpoint, "_digest", fails)
    found = checkpoint.newest_complete(tmp_path)
    assert found.folder == tmp_path / "checkpoint-1"
    assert found.passed_over == [(tmp_path / "checkpoint-2", "a cannot be read: Input/output error")]


def test_a_checkpoint_is_set_aside_under_a_free_name(tmp_path):
    for name in ("checkpoint-2", "passed-over-checkpoint-2"):
        (tmp_path / name).mkdir()
    assert checkpoint.set_aside(tmp_path / "checkpoint-2").name == "passed-over-checkpoint-2-2"


@pytest.mark.slow
def test_a_damaged_best_checkpoint_does_not_cost_the_last_one(model, tmp_path):
    """With one checkpoint to keep, transformers deletes at the end all but the best."""
    folder = tmp_path / "run"

    def spoil(state):
        if state.global_step == 4:
            best = Path(state.best_model_checkpoint)
            assert best.name != "checkpoint-4"
            (best / "adapter_model.safetensors").write_bytes(b"x")

    given = short(model, folder, save_total_limit=1, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1)
    given["training_config"] |= {"metric_for_best_model": "eval_num_tokens", "greater_is_better": False}
    philora.train(given, callbacks=[At("save", spoil)])
    assert checkpoint.newest_complete(folder / "checkpoints").folder.name == "checkpoint-4"


# ---------------------------------------------------------------------------------------------- ended early


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_anything_is_saved(settings, tmp_path, monkeypatch, number, code):
    folder, load = tmp_path / "runs" / "run", models.load_model
    for name in ("load_model", "evaluate"):
        with monkeypatch.context() as patched:
            patched.setattr(models if name == "load_model" else run_evaluation, name, lambda *_, **__: stop(number))
            with pytest.raises(Interrupted, match=r"stopped before training. Nothing was saved; start it") as caught:
                philora.train(settings)
        assert caught.value.exit_code == code
        assert "--resume" not in str(caught.value)
        assert folder.exists() == (name == "evaluate")
    assert models.load_model is load
    assert philora.train(settings).results["throughput"]["steps"] == 2, "the same command works again"


def stop(number):
    os.kill(os.getpid(), number)


@pytest.mark.slow
def test_a_signal_in_the_evaluation_on_start_saves_nothing_and_says_so(settings, tmp_path):
    settings["training_config"] |= {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    with pytest.raises(Interrupted, match=r"Nothing was saved; start it again with") as caught:
        philora.train(settings, callbacks=[At("prediction_step", lambda _: stop(signal.SIGTERM))])
    assert caught.value.exit_code == 143
    assert philora.train(settings, resume=True).results["throughput"]["steps"] == 2


def test_a_signal_after_a_checkpoint_goes_on(settings, tmp_path):
    with pytest.raises(Interrupted, match=r"checkpoint-1 is saved .* Continue with: .* --resume") as caught:
        philora.train(settings, callbacks=[At("step_end", lambda _: stop(signal.SIGINT))])
    assert caught.value.exit_code == 3
    with pytest.raises(ConfigError, match=r"holds another run. Continue with --resume, or"):
        philora.train(settings)
    assert philora.train(settings, resume=True).results["throughput"]["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("place", ["load_model", "evaluate"])
def test_a_kill_before_anything_is_saved_blocks_nothing(settings, tmp_path, monkeypatch, place):
    def killed():
        torch.set_num_threads(1)  # OpenMP's threads of the parent do not exist in a forked child
        monkeypatch.setattr(
            models if place == "load_model" else run_evaluation, place, lambda *_, **__: stop(signal.SIGKILL)
        )
        torture.run(settings, False, tmp_path / "notes")

    assert torture.ended(torture.forked(killed, tmp_path / "notes")) == -signal.SIGKILL
    assert (tmp_path / "runs" / "run" / "config.yaml").exists()
    assert philora.train(settings).results["throughput"]["steps"] == 2


# ----------------------------------------------------------------------------------------- one of several GPUs


def test_of_several_gpus_one_is_taken_and_said(settings, monkeypatch, caplog):
    """There is no GPU here: what transformers and the notice look at says that there are two."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    caplog.set_level(logging.WARNING)
    found = preflight(settings)
    said = (
        "2 GPUs are visible and one process trains, on the first of them. On all of them: torchrun --nproc-per-node 2"
    )
    assert any(said in each for each in found.notices)
    assert ("devices", "one of 2 GPUs") in found.plan.rows()
    assert philora.train(settings).results["throughput"]["steps"] == 2  # TRL ends here with a ValueError otherwise
    assert said in caplog.text
    assert planning.idle_gpus(settings["training_config"], "auto") == 0


# ------------------------------------------------------------------------------------------ odd machines, odd clocks


def test_a_system_that_does_not_tell_the_peak(tmp_path, monkeypatch):
    status = tmp_path / "status"
    assert callbacks._peak_by_status(status) is None
    status.write_text("Name:\tpython\nVmHWM:\t  2048 kB\n")
    assert callbacks._peak_by_status(status) == 2048 * 1024
    for text in ("Name:\tpython\n", "VmHWM:\n", "VmHWM: unknown kB\n", ""):
        status.write_text(text)
        assert callbacks._peak_by_status(status) is None
    monkeypatch.setattr(callbacks, "_peak_by_status", lambda path: None)
    assert callbacks.peak_memory_bytes() >= psutil.Process().memory_info().rss / 2


def test_a_process_without_a_home(monkeypatch, tmp_path):
    def nobody(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    user_cache._temporary.cache_clear()
    assert user_cache.user_cache() == tmp_path / f"philora-{os.getuid()}"
    assert (tmp_path / f"philora-{os.getuid()}").stat().st_mode & 0o777 == 0o700
    user_cache._temporary.cache_clear()
    (tmp_path / f"philora-{os.getuid()}").chmod(0o777)
    assert user_cache.user_cache() != tmp_path / f"philora-{os.getuid()}", "others may have put something there"
    user_cache._temporary.cache_clear()
    with pytest.raises(ConfigError, match=r"training_config.output_dir='~/x' - expected a path whose home folder is"):
        load_config({"data": {"train": "helpdesk"}, "training_config": {"output_dir": "~/x"}})
    with pytest.raises(ConfigError, match=r"model.name_or_path='~nobody-of-that-name/x' - expected a path whose home"):
        load_config({"data": {"train": "helpdesk"}, "model": {"name_or_path": "~nobody-of-that-name/x"}})


@pytest.mark.slow
@pytest.mark.parametrize("event", ["step_end", "prediction_step"])
def test_a_clock_that_is_set_back_makes_no_negative_durations(settings, tmp_path, monkeypatch, event):
    clock, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: clock() + ahead[0])
    settings["training_config"] |= {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1}
    settings["training_config"] |= {"include_num_input_tokens_seen": True}

    def back(_):
        ahead[0] -= 7200

    results = philora.train(settings, callbacks=[At(event, back)]).results
    folder = tmp_path / "runs" / "run"
    assert ahead[0] < 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figures = {
        key: value
        for each in (*lines, results, results["throughput"], json.loads((folder / "train_results.json").read_text()))
        for key, value in each.items()
        if key.endswith(("runtime", "per_second", "seconds"))
    }
    assert {"eval_runtime", "train_runtime", "duration_seconds", "tokens_per_second"} <= set(figures)
    assert all(0 <= value < 600 for key, value in figures.items() if "per" not in key), figures
    assert all(value > 0 for key, value in figures.items() if "per" in key), figures
    assert "took -" not in (folder / "report.html").read_text()


# ------------------------------------------------------------------------------------- what `check` proves


def model_without(model, folder, change):
    shutil.copytree(model, folder)
    change(folder / "model.safetensors")
    return str(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def loop(path):
    path.symlink_to(path)
    return path


def dangling(path):
    path.symlink_to(path.with_name("nothing"))
    return str(path)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda s, m, t: s["model"].update(name_or_path=model_without(m, t / "m", Path.unlink)), ModelError,
         r"model: name_or_path=.* - expected a model with its weights: model.safetensors.* Copy the complete model"),
        (lambda s, m, t: s["model"].update(name_or_path=model_without(m, t / "m", cut)), ModelError,
         r"model.safetensors: content=.* - expected a complete safetensors file. Copy the model again"),
        (lambda s, m, t: s["training_config"].update(optim="galore_adamw", optim_target_modules="all-linear"),
         ConfigError, r"training_config.optim='galore_adamw' - expected the package galore_torch"),
        (lambda s, m, t: s["training_config"].update(optim="schedule_free_adamw"),
         ConfigError, r"training_config.optim='schedule_free_adamw' - expected the package schedulefree"),
        (lambda s, m, t: s["training_config"].update(report_to=["mlflow"]),
         ConfigError, r"training_config.report_to='mlflow' - expected a tracker whose package is installed"),
        (lambda s, m, t: s["model"].update(adapter=str(t)), AdapterError,
         r"expected a run folder, or a folder with adapter_config.json"),
        (lambda s, m, t: s["training_config"].update(output_dir="/proc/run"), ConfigError,
         r"training_config.output_dir='/proc/run' - expected a folder that can be written to"),
        (lambda s, m, t: s["training_config"].update(output_dir=str(t / ("x" * 300))), ConfigError,
         r"training_config.output_dir=.* - expected a folder that can be written to: File name too long"),
        (lambda s, m, t: s["training_config"].update(output_dir=str(t / "a\0b")), ConfigError,
         r"training_config.output_dir=.* - expected a folder that can be written to: .*null"),
        (lambda s, m, t: s["training_config"].update(output_dir=dangling(t / "link")),
         ConfigError, r"training_config.output_dir=.* can be written to: it is a link to .*nothing"),
        (lambda s, m, t: s["training_config"].update(output_dir=str(loop(t / "loop"))),
         ConfigError, r"training_config.output_dir=.* - expected a folder that can be written to"),
        (lambda s, m, t: ((t / "f").touch(), s["training_config"].update(output_dir=str(t / "f" / "run"))),
         ConfigError, r"training_config.output_dir=.* - expected a folder that can be written to"),
    ],
    ids=lambda each: "" if callable(each) else None,
)  # fmt: skip
def test_check_and_train_refuse_the_same_before_the_data_is_prepared(
    settings, model, tmp_path, monkeypatch, change, error, text
):
    (tmp_path / "t").mkdir()
    change(settings, model, tmp_path / "t")
    before = sorted(tmp_path.rglob("*"))

    def never(*_, **__):
        raise AssertionError("the data is prepared")

    monkeypatch.setattr("philora.training.readiness.prepare", never)
    monkeypatch.setattr("philora.training.run.prepare", never)
    with pytest.raises(error, match=text) as checked:
        preflight(settings)
    with pytest.raises(error) as trained:
        philora.train(settings)
    assert str(checked.value) == str(trained.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_check_looks_at_the_room_on_the_disk(settings, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(RunError, match=r"free space for about [\d,]+ bytes: checkpoints of"):
        preflight(settings)


def test_a_run_begins_from_the_adapter_of_a_run_folder(model, whole, tmp_path, settings):
    settings["model"]["adapter"] = str(whole)
    assert preflight(settings).coverage.trainable_parameters > 0
    result = philora.train(settings)
    digests = json.loads((result.folder / "run.json").read_text())["adapter"]
    assert "adapter_model.safetensors" in digests, "of the adapter, not of the run folder"
    assert result.results["before"] == json.loads((whole / "results.json").read_text())["before"]


def test_an_adapter_of_another_base_is_refused_by_check(model, whole, tmp_path, settings):
    other = tmp_path / "adapter"
    shutil.copytree(whole / "adapter", other)
    config = json.loads((other / "adapter_config.json").read_text())
    config["r"] = 64
    (other / "adapter_config.json").write_text(json.dumps(config))
    settings["model"]["adapter"] = str(other)
    with pytest.raises(AdapterError, match="shape"):
        preflight(settings)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process as Linux has them")
@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_count_as_memory(tmp_path, name):
    def limited():
        held = psutil.Process().memory_info()
        limit = (held.vms if name == "RLIMIT_AS" else held.data) + (64 << 20)
        resource.setrlimit(getattr(resource, name), (limit, resource.RLIM_INFINITY))
        assert 0 < memory.free_bytes("cpu") <= 64 << 20

    notes = tmp_path / "notes"
    assert torture.ended(torture.forked(limited, notes)) == 0, notes.read_text()


# --------------------------------------------------------------------------------------- full disks, equal adapters


def test_an_export_on_a_full_disk_says_so_and_leaves_nothing(whole, tmp_path, monkeypatch):
    from philora.exporting import conversion

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversion, "write_peft", full)
    with pytest.raises(
        RunError, match=r"disk: folder=.*out' - expected free space for it: .*No space left.* Free some"
    ):
        philora.export(whole, tmp_path / "out", format="peft", layout="server")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"export: out=.* - expected a folder that can be written to: File name too"):
        philora.export(whole, tmp_path / ("x" * 300), format="peft")
    with pytest.raises(ConfigError, match=r"merge: out=.* - expected a folder that can be written to: File name too"):
        philora.merge_to_folder(whole, tmp_path / ("x" * 300))


def test_an_adapters_lists_are_sorted(settings, whole):
    """PEFT keeps them as sets, whose order changes from process to process."""
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    settings["peft_config"]["target_modules"] = names
    for folder, expected in ((philora.train(settings).adapter, names), (whole / "adapter", None)):
        found = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
        assert found == sorted(expected or found)


@pytest.mark.slow
def test_equal_runs_have_equal_adapter_folders(model, whole, tmp_path):
    result = philora.train(short(model, tmp_path / "again"))
    assert content(result.adapter) == content(whole / "adapter")


# --------------------------------------------------------------------------------------------- damaged models


def test_a_damaged_configuration_of_a_model_is_told(model, settings, tmp_path):
    """One message for each of some values that break transformers in as many ways; the long form is the torture's."""
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    good = json.loads((folder / "config.json").read_text())
    settings["model"]["name_or_path"] = str(folder)
    wrong = []
    for key, value in [
        ("num_attention_heads", 0), ("num_attention_heads", None), ("hidden_size", -1), ("hidden_size", "x"),
        ("hidden_act", "x"), ("hidden_act", 3), ("rope_scaling", [1]), ("rope_parameters", "x"), ("model_type", 3),
        ("architectures", 3), ("vocab_size", 0), ("vocab_size", 1.5), ("max_position_embeddings", "x"),
        ("max_position_embeddings", 0), ("num_hidden_layers", None), ("num_hidden_layers", 10**9), ("eos_token_id", {}),
        ("num_key_value_heads", 3), ("quantization_config", 1), ("auto_map", 1),
    ]:  # fmt: skip
        (folder / "config.json").write_text(json.dumps({**good, key: value}))
        try:
            preflight(settings)
        except PhiloraError as error:
            if str(folder) not in str(error) and "model" not in str(error):
                wrong.append((key, value, str(error)))
        except Exception as error:  # noqa: BLE001 (what is looked for)
            wrong.append((key, value, repr(error)))
    assert not wrong
