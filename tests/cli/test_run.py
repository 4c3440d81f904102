"""A whole run: the folder, resuming, signals, a full disk, accepted oddities."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import philora
from philora.files.checkpoint import faults_of
from philora.models.loading import local_path
from tests.cli.conftest import process
from tests.tolerances import LOGITS_FP32


def steps(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {entry["step"]: entry for entry in map(json.loads, lines) if "loss" in entry}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run that nothing interrupts, by the Python function."""
    from tests.cli.conftest import QUICK

    folder = tmp_path_factory.mktemp("whole") / "run"
    settings = json.loads(json.dumps(QUICK))
    settings["data"] = {"train": {"path": "helpdesk", "limit": 60}, "eval": {"path": "helpdesk", "limit": 8}}
    settings["training_config"] |= {"output_dir": str(folder), "report_to": ["tensorboard"], "eval_strategy": "steps",
                                    "eval_steps": 2}  # fmt: skip
    return philora.train(settings)


def test_the_run_folder_is_complete(whole):
    names = {each.name for each in whole.folder.iterdir()}
    assert names >= {
        "config.yaml", "adapter", "checkpoints", "metrics.jsonl", "train_results.json", "eval_results.json",
        "trainer_state.json", "results.json", "train.log", "report.html",
    }  # fmt: skip
    adapter = {each.name for each in whole.adapter.iterdir()}
    assert adapter >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "generation_config.json", "README.md",
        "philora.json",
    }  # fmt: skip
    results = json.loads((whole.folder / "results.json").read_text())
    assert results["before"]["loss"] > results["after"]["loss"]
    assert json.loads((whole.folder / "run.json").read_text())["first_loss"] == results["before"]["loss"]
    assert results["samples"]
    assert results["throughput"]["tokens"] > 0
    assert steps(whole.folder).keys() == {1, 2, 3, 4}
    assert all(entry["tokens_per_second"] > 0 and entry["memory_bytes"] > 0 for entry in steps(whole.folder).values())
    assert (whole.folder / "report.html").read_text().count("<svg") >= 2
    assert "evaluating before training" in (whole.folder / "train.log").read_text()
    checkpoints = sorted(each.name for each in (whole.folder / "checkpoints").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-4"]
    newest = whole.folder / "checkpoints" / "checkpoint-4"
    assert not faults_of(newest)
    sizes = sum(each.stat().st_size for each in newest.glob("*.safetensors"))
    assert sizes < 1_000_000, "a checkpoint holds the adapter only"


def test_tensorboard_gets_the_curves(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = list(whole.folder.rglob("events.out.tfevents.*"))
    assert events
    reader = EventAccumulator(str(events[0].parent))
    reader.Reload()
    tags = set(reader.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "eval/loss", "train/tokens_per_second"} <= tags
    assert len(reader.Scalars("train/loss")) == 4


def test_the_adapter_loads_in_peft(whole):
    def base():
        return AutoModelForCausalLM.from_pretrained(local_path("nano"), dtype=torch.float32).eval()

    ids = torch.randint(3, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base(), str(whole.adapter)).eval()(input_ids=ids).logits
        mine = philora.load_adapter(base(), whole.adapter).eval()(input_ids=ids).logits
        plain = base()(input_ids=ids).logits
    assert (mine - theirs).abs().max() <= LOGITS_FP32 * theirs.abs().max()
    assert (plain - theirs).abs().max() > LOGITS_FP32 * theirs.abs().max()


def test_the_written_configuration_is_the_same_run(whole):
    from philora.configuration.config import load_config

    again = load_config(whole.folder / "config.yaml")
    assert again.training_config["seed"] == 7
    assert load_config(again.to_dict()) == again


@pytest.mark.slow
def test_resume_goes_on_and_equals_the_whole_run(cli, config, tmp_path):
    path = config(training_config__save_steps=2)
    assert cli("train", path).code == 0
    run = tmp_path / "run"
    before = steps(run)
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    shutil.rmtree(run / "adapter")
    answer = cli("train", path, "--resume")
    assert answer.code == 0, answer.err
    assert steps(run).keys() == {1, 2, 3, 4}
    for step, entry in steps(run).items():
        assert entry["loss"] == before[step]["loss"]
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_torn_checkpoint_is_passed_over_and_named(cli, config, tmp_path):
    path = config()
    assert cli("train", path).code == 0
    torn = tmp_path / "run" / "checkpoints" / "checkpoint-4" / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    answer = cli("train", path, "--resume")
    assert answer.code == 0, answer.err
    assert "checkpoint-4 is skipped: adapter_model.safetensors has 100 bytes" in " ".join(answer.err.split())


@pytest.mark.slow
def test_resume_with_other_settings_is_refused_unless_forced(cli, config, tmp_path):
    path = config()
    assert cli("train", path).code == 0
    answer = cli("train", path, "training_config.learning_rate=2e-3", "--resume")
    assert answer.code == 2
    text = " ".join(answer.err.split())
    assert "learning_rate=0.002 - expected the value that the run was started with: 0.001" in text
    assert "--resume=force" in text
    assert cli("train", path, "training_config.learning_rate=2e-3", "--resume=force").code == 0


@pytest.mark.slow
def test_a_run_may_start_from_an_adapter(cli, config, whole, tmp_path):
    path = config(model={"name_or_path": "nano", "dtype": "float32", "adapter": str(whole.adapter)})
    assert cli("train", path).code == 0
    first = json.loads((whole.folder / "results.json").read_text())
    second = json.loads((tmp_path / "run" / "results.json").read_text())
    assert second["before"]["loss"] == first["before"]["loss"], "before is the base, without the adapter"
    assert steps(tmp_path / "run")[1]["loss"] < steps(whole.folder)[1]["loss"]
    assert second["coverage"] == first["coverage"]


@pytest.mark.slow
def test_whole_modules_and_dora_train_beside_a_bf16_base(cli, config, tmp_path):
    path = config(
        model={"name_or_path": "nano", "dtype": "bfloat16"},
        peft_config={"r": 4, "use_dora": True, "target_modules": ["qkv_proj"], "modules_to_save": ["lm_head"]},
    )
    answer = cli("train", path)
    assert answer.code == 0, answer.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["loss"] < results["before"]["loss"]
    base = AutoModelForCausalLM.from_pretrained(local_path("nano"), dtype=torch.bfloat16)
    head = base.lm_head.weight.detach().clone()
    trained = philora.load_adapter(base, tmp_path / "run" / "adapter")
    saved = trained.get_base_model().lm_head.modules_to_save["default"].weight
    assert not torch.equal(saved, head), "the head was left without a gradient"


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_training_stops_early(cli, config, tmp_path):
    path = config(
        training_config__learning_rate=0.05,
        training_config__max_steps=60,
        training_config__eval_strategy="steps",
        training_config__eval_steps=2,
        training_config__load_best_model_at_end=True,
        training_config__metric_for_best_model="eval_loss",
        training_config__early_stopping_patience=2,
        training_config__save_total_limit=1,
    )
    assert cli("train", path).code == 0
    run = tmp_path / "run"
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["global_step"] < 60
    best = run / "checkpoints" / f"checkpoint-{state['best_global_step']}"
    assert state["best_model_checkpoint"] == str(best)
    assert not faults_of(best)
    weights = (best / "adapter_model.safetensors").read_bytes()
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_small_data_gets_more_than_a_handful_of_steps(cli, config, jsonl, tmp_path):
    turns = [("user", "What is {n} and one?"), ("assistant", "It is more than {n}.")]
    rows = [{"messages": [{"role": role, "content": text.format(n=n)} for role, text in turns]} for n in range(20)]
    long = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well " * 300}]}
    evaluated = jsonl([long], "eval.jsonl")
    path = config(
        data={"train": str(jsonl(rows)), "eval": str(evaluated)},
        training_config={"output_dir": str(tmp_path / "run"), "learning_rate": 1e-3, "num_train_epochs": 12},
    )
    assert cli("train", path).code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["throughput"]["steps"] >= 12
    assert results["data"]["eval"]["truncated"] == 0
    assert results["after"]["label_tokens"] > 250, "held-out rows are not cut to the short rows of the training data"


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited too long")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_resume(config, tmp_path, number):
    path = config(training_config__max_steps=2000, training_config__save_steps=5000)
    run = process("train", path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: (metrics.exists() and metrics.stat().st_size > 0) or run.poll() is not None)
    run.send_signal(number)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 3, err
    assert f"{number.name}: stopped after step" in err
    assert "--resume" in err
    saved = list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert len(saved) == 1
    assert not faults_of(saved[0])


@pytest.mark.slow
def test_two_runs_into_one_folder(config, tmp_path):
    path = config(training_config__max_steps=2000, training_config__save_steps=5000)
    first = process("train", path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() or first.poll() is not None)
    second = process("train", path, "--resume")
    _, err = second.communicate(timeout=120)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert "that no other run is writing to" in " ".join(err.split())


def can_mount():
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs a user namespace that may mount a small file system")
def test_a_full_disk_harms_nothing(config, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    path = config(
        training_config__max_steps=400, training_config__save_steps=2, training_config__save_total_limit=None,
        training_config__output_dir=str(small / "run"),
    )  # fmt: skip
    kept = tmp_path / "kept"
    script = (
        f"mount -t tmpfs -o size=40m tmpfs {small} && "
        f"{{ (while [ ! -d {small}/run/checkpoints/checkpoint-4 ]; do sleep 0.05; done; "
        f"head -c 40m /dev/zero > {small}/filler) 2>/dev/null & "
        f"{sys.executable} -m philora train {path}; code=$?; cp -r {small}/run {kept}; exit $code; }}"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "No space left" in done.stderr
    assert re.search(r"free space for about [\d,]+ bytes", done.stderr)
    assert "--resume" in done.stderr
    checkpoints = list((kept / "checkpoints").glob("checkpoint-*"))
    assert checkpoints
    assert all(not faults_of(each) for each in checkpoints)
    for line in (kept / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_oddities_are_accepted_with_a_notice(cli, config, jsonl, tmp_path):
    def conversation(*turns):
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    twice = conversation(("user", "one"), ("user", "two"), ("assistant", "three"))
    long = conversation(("user", "hi"), ("assistant", "word " * 100_000))
    others = [conversation(("user", f"q{n}"), ("assistant", f"a{n}")) for n in range(20)]
    path = jsonl([twice, long, *others])
    answer = cli("train", config(data={"train": str(path), "eval": None}, training_config__max_steps=1))
    assert answer.code == 0, answer.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"]["train"]["truncated"] == 1
    assert results["data"]["train"]["two_user_turns"] == 1
    assert results["before"] is None
    text = " ".join(answer.err.split())
    assert "user turns" in text
    assert "longer than 256 tokens and were cut there" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["tests/scripts/trl_script.py", pytest.param("examples/sample_finetune.py", marks=pytest.mark.slow)]
)
def test_scripts_with_the_import_changed_run(script, tmp_path):
    from importlib import resources
    from pathlib import Path

    data = resources.files("philora") / "nano" / "helpdesk" / "train.jsonl"
    given = [local_path("nano"), str(data), str(tmp_path / "out")]
    if script.startswith("examples"):
        given = ["--model", given[0], "--data", given[1], "--out", given[2], "--limit", "200", "--epochs", "3"]
    command = [sys.executable, str(Path(__file__).parents[2] / script), *given]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    if script.startswith("examples"):
        assert done.stderr.count("warmup_ratio=0.2 is an older spelling") == 1
        assert (tmp_path / "out" / "eval_results.json").is_file()
