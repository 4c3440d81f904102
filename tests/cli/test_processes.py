"""Several real processes on one machine, over gloo: what one process would do, done once, ended together."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import philora
from philora.evaluation.scores import Evaluation, RowScores, Sample, Scores, joined
from philora.files import checkpoint
from philora.training.readiness import preflight
from tests.cli.conftest import QUICK
from tests.tolerances import LOSS_STEP_FP32

START = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
TORCHRUN = [*START, "philora", "train"]
REPOSITORY = Path(__file__).resolve().parents[2]


def settings_of(folder, **changes):
    """A run of a few steps whose micro-batch and accumulation are left to the plan."""
    settings = json.loads(json.dumps(QUICK))
    settings["data"] = {"train": {"path": "helpdesk", "limit": 70}, "eval": {"path": "helpdesk", "limit": 9}}
    settings["peft_config"]["lora_dropout"] = 0.0
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        del settings["training_config"][key]
    settings["training_config"] |= {"output_dir": str(folder), "tokens_per_step": 1024, "max_steps": 4, **changes}
    return settings


def launch(folder, settings, *arguments, launcher=TORCHRUN, start_new_session=False):
    """Start the run in two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    return subprocess.Popen(
        [*launcher, str(path), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=start_new_session,
    )


def finished(process, seconds=240):
    """Exit code, standard output and standard error of a process."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        raise
    return process.returncode, out, err


def end(process):
    """Kill a launcher and its processes, which would outlive it."""
    with contextlib.suppress(subprocess.CalledProcessError, ProcessLookupError):
        for each in ranks_of(process):
            os.kill(each, signal.SIGKILL)
    process.kill()


def until_step(process, folder, step, seconds=120):
    """Wait until a run has written the log line of a step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len(entries(folder)) >= step:
            return
        time.sleep(0.05)
    end(process)
    raise AssertionError(process.communicate())


def ranks_of(process):
    """Process ids of the ranks, in their order."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    rank = {}
    for each in found:
        environment = Path(f"/proc/{each}/environ").read_bytes().split(b"\0")
        rank[next(int(line[5:]) for line in environment if line.startswith(b"RANK="))] = int(each)
    return [rank[each] for each in sorted(rank)]


def said(err):
    """What philora said at the end, and torchrun's own report of it left out."""
    return [line for line in err.splitlines() if line.startswith("philora: ")]


def exit_codes(err):
    """The ranks' exit codes in torchrun's report."""
    return [int(line.split(":")[1].split("(")[0]) for line in err.splitlines() if line.strip().startswith("exitcode ")]


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


@pytest.mark.slow
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
    assert err.count("step 4/4") == 1
    assert "step 4/4" not in out
    assert err.count("evaluating before training") == 1
    assert "in each of 2 processes" in err
    assert (folder / "two" / "train.log").read_text().count("evaluating before training") == 1
    kept = sorted(each.name for each in (folder / "two" / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_another_share_shows(both, tmp_path):
    """The comparison of losses can fail: a step of half as many rows has others."""
    folder, _, _ = both
    philora.train(settings_of(tmp_path / "half", tokens_per_step=512))
    assert largest_gap(losses(tmp_path / "half"), losses(folder / "two")) > 10 * LOSS_STEP_FP32


def test_parts_of_an_evaluation_are_joined_by_their_labels():
    sample = Sample([{"role": "user", "content": "a"}], "b", "b", matched=True, stopped=True, tokens=1)
    parts = [
        Evaluation(Scores(1.0, 2.7, 0.5, 30, 1.0, 1, 1), [sample], 1.0, rows=[RowScores(30.0, 15, 30)]),
        Evaluation(Scores(4.0, 54.6, 0.2, 10, None, 0, 0), [], 2.0, too_long=1, rows=[RowScores(40.0, 2, 10)]),
        Evaluation(Scores(float("nan"), float("nan"), float("nan"), 0), [], 0.0),
    ]
    whole = joined(parts)
    assert whole.scores.loss == pytest.approx(1.75)
    assert whole.scores.token_accuracy == pytest.approx(0.425)
    assert (whole.scores.label_tokens, whole.scores.answers, whole.scores.exact_match) == (40, 1, 1.0)
    assert (whole.seconds, whole.too_long, whole.samples) == (2.0, 1, [sample])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("fsdp", "full_shard", "expected nothing on a CPU"),
        ("deepspeed", {"zero_optimization": {"stage": 3}}, "expected the package deepspeed"),
    ],
)
def test_check_says_what_a_run_here_would_be_refused_for(tmp_path, key, value, expected):
    settings = settings_of(tmp_path / "run")
    assert not any("would be refused" in each for each in preflight(settings).notices)
    settings["training_config"][key] = value
    (notice,) = [each for each in preflight(settings).notices if "a run here would be refused" in each]
    assert expected in notice


def test_other_commands_are_for_one_process():
    """Each process would do the whole of it, into the same files."""
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "philora", "demo"]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert found.returncode == 2
    message = "philora: philora: command='demo' - expected train, the command that several processes share."
    assert found.stderr.startswith(message), found.stderr


# ---------------------------------------------------------------------------------------- going on, and not


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(tmp_path):
    """With dropout, packing, accumulation, an epoch's end in the middle and a last step that rows do not fill."""
    settings = settings_of(
        tmp_path / "run",
        max_steps=9,
        save_steps=1,
        save_total_limit=None,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
    )
    settings["peft_config"]["lora_dropout"] = 0.2
    code, _, err = finished(launch(tmp_path, settings))
    assert code == 0, err
    run = tmp_path / "run"
    epochs = [entry["epoch"] for entry in entries(run)]
    assert 1 < epochs[4] < epochs[-1]
    whole, expected = losses(run), (run / "adapter" / "adapter_model.safetensors").read_bytes()
    for step in (2, 5):
        shutil.rmtree(run / "adapter")
        for each in range(step + 1, 10):
            shutil.rmtree(run / "checkpoints" / f"checkpoint-{each}")
        code, _, err = finished(launch(tmp_path, settings, "--resume"))
        assert code == 0, err
        assert losses(run) == whole
        assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == expected
    other = json.loads(json.dumps(settings))
    other["training_config"] |= {"output_dir": str(tmp_path / "other"), "seed": 8}
    code, _, err = finished(launch(tmp_path, other))
    assert code == 0, err
    assert losses(tmp_path / "other") != whole, "negative control"


@pytest.mark.slow
def test_another_number_of_processes_is_refused_unless_forced(both, cli, tmp_path):
    folder, _, _ = both
    shutil.copytree(folder / "two", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    settings = settings_of(folder / "two")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    kept = tmp_path / "kept"
    (folder / "two").rename(kept)
    try:
        shutil.copytree(tmp_path / "run", folder / "two")
        answer = cli("train", path, "--resume")
        assert answer.code == 2
        assert "processes=1 - expected the value that the run was started with: 2" in " ".join(answer.err.split())
        assert "--resume=force" in answer.err
        answer = cli("train", path, "--resume=force")
        assert answer.code == 0, answer.err
        assert largest_gap(losses(folder / "two"), losses(folder / "one")) <= LOSS_STEP_FP32, "a step has as many rows"
    finally:
        shutil.rmtree(folder / "two", ignore_errors=True)
        kept.rename(folder / "two")


# ------------------------------------------------------------------------------------------------ the end


@pytest.mark.slow
@pytest.mark.parametrize("reached", ["launcher", "terminal", "one rank"])
def test_a_signal_saves_one_checkpoint_and_ends_all(tmp_path, reached):
    settings = settings_of(tmp_path / "run", max_steps=500, save_steps=1000)
    command = launch(tmp_path, settings, start_new_session=True)
    until_step(command, tmp_path / "run", 2)
    if reached == "launcher":
        command.send_signal(signal.SIGTERM)
    elif reached == "terminal":
        os.killpg(command.pid, signal.SIGINT)
    else:
        os.kill(ranks_of(command)[1], signal.SIGTERM)
    code, _, err = finished(command)
    assert code == 1, "torchrun's own"
    message = said(err)
    assert len(message) == 1, err
    name = "SIGINT" if reached == "terminal" else "SIGTERM"
    assert f"philora: {name}: stopped after step " in message[0]
    assert "torchrun --nproc-per-node 2 -m philora train" in message[0]
    assert message[0].endswith("--resume")
    if reached == "one rank":
        assert exit_codes(err) == [3, 3]
    kept = list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert len(kept) == 1
    step = int(kept[0].name.removeprefix("checkpoint-"))
    settings["training_config"]["max_steps"] = 500
    again = launch(tmp_path, settings, "--resume")
    until_step(again, tmp_path / "run", step + 1)
    again.send_signal(signal.SIGTERM)
    finished(again)
    assert [entry["step"] for entry in entries(tmp_path / "run")][: step + 1] == list(range(1, step + 2))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_other_ends(tmp_path, victim):
    command = launch(tmp_path, settings_of(tmp_path / "run", max_steps=500, save_steps=1))
    until_step(command, tmp_path / "run", 3)
    os.kill(ranks_of(command)[victim], signal.SIGKILL)
    begun = time.monotonic()
    code, _, err = finished(command, 60)
    assert time.monotonic() - begun < 40
    assert code == 1
    assert sorted(exit_codes(err)) == [-9, 1]
    assert len(said(err)) == 1
    assert "expected every process to continue, but another one has ended" in said(err)[0]
    assert checkpoint.newest_complete(tmp_path / "run" / "checkpoints").folder is not None


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_one_process_is_one_message(tmp_path, rank):
    launcher = [*START, "tests.scripts.failing_rank", str(rank)]
    code, _, err = finished(launch(tmp_path, settings_of(tmp_path / "run", max_steps=50), launcher=launcher))
    assert code == 1
    assert said(err) == [f"philora: planted: rank={rank} - expected to continue."]
    assert exit_codes(err) == [1, 1]
    assert err.count("Traceback (most recent call last)") == 1, "torchrun's own"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learnin_rate": 1}, "learnin_rate=1 - expected a key of trl.SFTConfig"),
        ({"fsdp": True}, "fsdp=True - expected nothing on a CPU, where accelerate would train without it"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "expected the package deepspeed, which is not installed"),
    ],
)
def test_bad_input_is_one_message(tmp_path, changes, message):
    code, _, err = finished(launch(tmp_path, settings_of(tmp_path / "run", **changes)))
    assert code == 1
    assert len(said(err)) == 1, err
    assert message in said(err)[0]
    assert exit_codes(err) == [2, 2]
    assert message in err.split("Root Cause")[1], "torchrun's report ends with it"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_data_is_one_message_and_the_lock_is_one_runs(tmp_path):
    settings = settings_of(tmp_path / "run")
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user"}]}\n', encoding="utf-8")
    settings["data"]["train"] = str(tmp_path / "bad.jsonl")
    code, _, err = finished(launch(tmp_path, settings))
    assert code == 1
    assert len(said(err)) == 1, err
    assert "bad.jsonl" in said(err)[0]
    assert exit_codes(err) == [2, 2]
    settings = settings_of(tmp_path / "run", max_steps=500)
    first = launch(tmp_path, settings)
    try:
        until_step(first, tmp_path / "run", 1)
        code, _, err = finished(launch(tmp_path, settings, "--resume"))
        assert len(said(err)) == 1, err
        assert "expected a folder that no other run is writing to" in said(err)[0]
        assert exit_codes(err) == [2, 2]
    finally:
        first.terminate()
        finished(first)


# ----------------------------------------------------------------------------------------------- launchers


@pytest.mark.slow
def test_accelerate_launch(both, tmp_path):
    """--multi_gpu is accelerate's name for torchrun's processes; without a GPU they train over gloo."""
    folder, _, _ = both
    start = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher = [*start, "--multi_gpu", "--main_process_port", "0", "-m", "philora", "train"]
    code, _, err = finished(launch(tmp_path, settings_of(tmp_path / "run"), launcher=launcher))
    assert code == 0, err
    assert losses(tmp_path / "run") == losses(folder / "two")


@pytest.mark.slow
def test_accelerate_on_a_cpu_starts_one_process_and_philora_says_so(both, tmp_path):
    folder, _, _ = both
    start = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher = [*start, "--cpu", "-m", "philora", "train"]
    code, _, err = finished(launch(tmp_path, settings_of(tmp_path / "run"), launcher=launcher))
    assert code == 0, err
    assert "one process trains: accelerate launch --cpu starts several by mpirun only" in err
    assert largest_gap(losses(tmp_path / "run"), losses(folder / "one")) <= LOSS_STEP_FP32


@pytest.mark.slow
def test_fsdp2(both, tmp_path):
    """Sharded for certain: accelerate is made to, and the parameters are DTensors while the model trains."""
    folder, _, _ = both
    launcher = [*START, "tests.scripts.fsdp_run", str(tmp_path / "classes.json")]
    options = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["Phi3DecoderLayer"]}}
    settings = settings_of(tmp_path / "run", **options)
    code, _, err = finished(launch(tmp_path, settings, launcher=launcher))
    assert code == 0, err
    assert json.loads((tmp_path / "classes.json").read_text()) == {"adapter": ["DTensor"], "base": ["DTensor"]}
    run = tmp_path / "run"
    assert largest_gap(losses(run), losses(folder / "one")) <= LOSS_STEP_FP32
    mine, ddp = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (run, folder / "two"))
    assert {name: each.shape for name, each in mine.items()} == {name: each.shape for name, each in ddp.items()}
    assert max((mine[name] - ddp[name]).abs().max() for name in mine) <= LOSS_STEP_FP32
    after = json.loads((run / "results.json").read_text())["after"]
    assert after["loss"] == pytest.approx(
        json.loads((folder / "one" / "results.json").read_text())["after"]["loss"], abs=LOSS_STEP_FP32
    )

    whole, expected = losses(run), (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    code, _, err = finished(launch(tmp_path, settings, "--resume", launcher=launcher))
    assert code == 0, err
    assert losses(run) == whole
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == expected
