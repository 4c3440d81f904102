"""From a data file to a trained model without a configuration, and the commands that say what there is."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import webbrowser

import pytest
import yaml

from philora.cli.doctor import device, the_hub
from philora.models.run_folder import TrainedRun
from philora.planning.hardware import DeviceFacts

QUICK = (
    "evaluation.generate=0", "training_config.max_steps=2", "training_config.save_steps=1",
    "training_config.eval_strategy=no", "--max-length", "128",
)  # fmt: skip


@pytest.fixture
def tickets(tmp_path, monkeypatch):
    """A CSV of questions and answers in the working folder."""
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "tickets.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "answer"])
        rows.writerows([f"How do I do {n}?", f"You do {n} so."] for n in range(40))
    return tmp_path / "tickets.csv"


def test_init_writes_a_configuration_and_checks_it(tickets, cli):
    done = cli("init", "tickets.csv")
    assert done.code == 0, done.err
    text = (tickets.parent / "tickets.yaml").read_text()
    assert yaml.safe_load(text)["data"] == {"train": "tickets.csv", "eval": 0.1}
    assert "40 records of tickets.csv, read as prompt_completion" in done.out
    last = done.out.splitlines()[-1]
    assert last.startswith("Ready: 32 conversations, ")
    assert last.endswith("Start: philora train tickets.yaml")
    assert not (tickets.parent / "runs").exists()
    again = cli("init", "tickets.csv")
    assert again.code == 2
    assert "out='tickets.yaml' - expected a file that does not exist yet" in again.err
    assert (tickets.parent / "tickets.yaml").read_text() == text


def test_init_takes_a_model_and_a_file(tickets, cli):
    done = cli("init", "tickets.csv", "--model", "phi-4-mini", "--out", "mine.yaml")
    assert "name_or_path='microsoft/Phi-4-mini-instruct' - expected a local folder" in " ".join(done.err.split())
    assert done.code == 2, "there is no network here"
    written = yaml.safe_load((tickets.parent / "mine.yaml").read_text())
    assert written["model"]["name_or_path"] == "microsoft/Phi-4-mini-instruct"


@pytest.mark.slow
def test_training_on_data_gets_a_folder_of_its_own(tickets, cli):
    done = cli("train", "tickets.csv", *QUICK, "--rank", "4", "--target-modules", "q_proj,v_proj")
    assert done.code == 0, done.err
    assert "40 records of tickets.csv, read as prompt_completion" in done.err
    assert "model: nano (a toy: the Hub cannot be reached" in done.err
    run = tickets.parent / "runs" / "tickets"
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["peft_config"]["r"] == 4
    assert config["peft_config"]["target_modules"] == ["q_proj", "v_proj"]
    assert config["training_config"]["max_length"] == 128
    for command in ("philora chat runs/tickets", "philora chat runs/tickets --web", "--format ollama"):
        assert command in done.out
    second = cli("train", "tickets.csv", *QUICK, "--quiet")
    assert second.code == 0, second.err
    assert second.out == ""
    assert "the plan" not in second.err
    assert (tickets.parent / "runs" / "tickets-2" / "adapter").is_dir()

    resumed = cli("train", "tickets.csv", "training_config.max_steps=3", "--resume=force")
    assert resumed.code == 0, resumed.err
    states = [json.loads((tickets.parent / "runs" / each / "trainer_state.json").read_text()) for each in
              ("tickets", "tickets-2")]  # fmt: skip
    assert [each["global_step"] for each in states] == [2, 3], "the newest continues"

    listed = json.loads(cli("runs", "--json").out)["runs"]
    assert {each["name"]: each["status"] for each in listed} == {"tickets": "done", "tickets-2": "done"}
    assert {each["base"] for each in listed} == {"nano"}
    assert all(each["loss"] > 0 and each["loss_before"] > 0 for each in listed)
    (run / "results.json").unlink()
    shown = cli("runs").out
    assert "stopped after step 2" in shown
    assert "nano" in shown


def test_a_named_folder_is_treated_as_ever(tickets, cli):
    (tickets.parent / "mine").mkdir()
    (tickets.parent / "mine" / "notes.txt").touch()
    done = cli("train", "tickets.csv", *QUICK, "--out", "mine")
    assert done.code == 2
    assert "expected a new or empty folder; this one holds other files" in " ".join(done.err.split())


@pytest.mark.parametrize(
    ("flag", "value", "key", "read"),
    [
        ("--learning-rate", "1e-4", "training_config.learning_rate", 1e-4),
        ("--epochs", "2", "training_config.num_train_epochs", 2),
        ("--max-length", "64", "training_config.max_length", 64),
        ("--batch-size", "3", "training_config.per_device_train_batch_size", 3),
        ("--seed", "9", "training_config.seed", 9),
        ("--out", "1e3", "training_config.output_dir", "1e3"),
        ("--rank", "2", "peft_config.r", 2),
        ("--alpha", "5", "peft_config.lora_alpha", 5),
        ("--dropout", "0.2", "peft_config.lora_dropout", 0.2),
        ("--target-modules", "all-linear", "peft_config.target_modules", "all-linear"),
        ("--target-modules", "q_proj, down_proj", "peft_config.target_modules", ["q_proj", "down_proj"]),
        ("--model", "phi-4", "model.name_or_path", "microsoft/phi-4"),
        ("--eval", "0.2", "data.eval", 0.2),
        ("--eval", "helpdesk", "data.eval", "helpdesk"),
    ],
)
def test_options_are_settings(flag, value, key, read, monkeypatch, cli):
    from philora.configuration.config import load_config
    from philora.configuration.writing import explain
    from philora.training import readiness

    found = {}

    def looked(source, overrides):
        found.update({name: (setting, origin) for name, setting, origin in explain(load_config(source, overrides))})
        raise KeyboardInterrupt

    monkeypatch.setattr(readiness, "preflight", looked)
    cli("check", "demo", flag, value)
    assert found[key] == (read, "command line")


def test_an_option_is_checked_as_its_setting_is(cli):
    done = cli("check", "demo", "--rank", "many")
    assert done.code == 2
    assert "command line: peft_config.r='many' - expected a whole number" in " ".join(done.err.split())


def test_check_ends_in_a_verdict(tickets, cli):
    ready = cli("check", "tickets.csv", "--quiet", "--epochs", "1")
    assert ready.code == 0
    assert ready.out.startswith("Ready: 32 conversations, ")
    assert ready.out.endswith("Start: philora train tickets.csv --epochs 1\n")
    assert len(ready.out.splitlines()) == 1
    (tickets.parent / "full").mkdir()
    (tickets.parent / "full" / "notes.txt").touch()
    found = json.loads(cli("check", "tickets.csv", "--out", "full", "--json").out)
    assert not found["ready"]
    assert found["verdict"].startswith("Not ready (32 conversations, ")
    assert found["problems"][0] in found["notices"]


@pytest.mark.parametrize(("named", "said"), [({}, True), ({"model": {"name_or_path": "nano"}}, False)])
def test_the_toy_is_named_loudly(tickets, cli, named, said):
    (tickets.parent / "a.yaml").write_text(yaml.safe_dump({**named, "data": {"train": "tickets.csv"}}))
    done = cli("check", "a.yaml")
    assert done.code == 0, done.err
    assert ("NO MODEL IS NAMED: this trains the bundled toy" in " ".join(done.out.split())) == said


def test_prompts_by_hand_and_over_a_pipe(cli, colours, monkeypatch):
    class Pipe(io.StringIO):
        buffer = None

    def ask(*arguments, text=b""):
        pipe = Pipe()
        pipe.buffer = io.BytesIO(text)
        monkeypatch.setattr(sys, "stdin", pipe)
        done = cli("generate", colours["red"], "--max-new-tokens", "3", *arguments)
        return done, [json.loads(each)["prompt"][-1]["content"] for each in done.out.splitlines()]

    assert ask("--prompt", "Who are you?", "--prompt", "And now?")[1] == ["Who are you?", "And now?"]
    assert ask("--prompts", "-", text=b"Who are you?\n\nAnd now?\n")[1] == ["Who are you?", "And now?"]
    assert ask("--prompts", "-", text=b'{"prompt": "Who are you?"}\n')[1] == ["Who are you?"]
    for arguments, text, message in (
        ((), b"", "prompts='nothing' - expected --prompts FILE, --prompts - or --prompt TEXT"),
        (("--prompt", "a", "--prompts", "-"), b"", "prompts='both'"),
        (("--prompts", "-"), b"", "standard input: prompts=0 - expected at least one line"),
        (("--prompts", "-"), b'{"prompt": "a"}\n{"promt": "b"}\n', "standard input:2"),
    ):
        done, _ = ask(*arguments, text=text)
        assert done.code == 2
        assert message in " ".join(done.err.split())


def test_a_report_is_opened(cli, colours, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    assert cli("report", colours["red"]).code == 0
    assert not opened
    assert cli("report", colours["red"], "--open").code == 0
    assert opened == [(colours["red"] / "report.html").as_uri()]


# -- what there is


def test_doctor_says_what_works(cli):
    done = cli("doctor")
    assert done.code == 0, done.out
    assert "philora works here" in done.out
    findings = json.loads(cli("doctor", "--json").out)["findings"]
    found = {each["name"]: each for each in findings}
    assert {"Python", "torch", "device", "compiler", "cache", "Hub's cache", "Hub"} <= set(found)
    assert found["Hub"]["status"] == "note"


def test_doctor_fails_where_something_is_missing(cli, monkeypatch):
    from philora.cli import doctor

    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no-such-package"))
    done = cli("doctor")
    assert done.code == 1
    assert "no-such-package" in done.out.splitlines()[-1]


def test_doctor_speaks_of_the_device():
    card = DeviceFacts(kind="cuda", name="A card", memory_bytes=80 * 10**9, capability=(9, 0), switch="", fused=True,
                       triton="3.9", flash=True)  # fmt: skip
    assert [each.status for each in device(card, "12.8", True)] == ["ok", "ok"]
    assert "A card, 80.0 GB, compute capability 9.0" in device(card, "12.8", True)[0].value
    broken = DeviceFacts(kind="cpu", name="a CPU", memory_bytes=10**9, capability=None, switch="", fused=True,
                         triton=None, flash=False, problem="the driver is too old")  # fmt: skip
    assert [each.status for each in device(broken, "12.8", False)] == ["ok", "note", "note"]


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [((True, True, True), "note", "HF_HUB_OFFLINE"), ((False, False, True), "note", "not found"),
     ((False, True, True), "ok", "logged in"), ((False, True, False), "ok", "public models only")],
)  # fmt: skip
def test_doctor_speaks_of_the_hub(facts, status, words):
    found = the_hub(*facts)
    assert found.status == status
    assert words in found.value


def test_runs_of_no_folder(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("runs").code == 2
    (tmp_path / "runs").mkdir()
    assert cli("runs").out == "no runs in runs\n"


def completed(folder, *words):
    """What the shell is offered for the last word."""
    line = " ".join(["philora", *words])
    environment = os.environ | {
        "_PHILORA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words)),
        "_TYPER_COMPLETE_ARGS": line,
    }  # fmt: skip
    program = "import sys; sys.argv[0] = 'philora'; from philora.cli.commands import app; app(prog_name='philora')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=folder)
    return done.stdout.split()


def test_the_shell_completes_settings_and_runs(tmp_path, colours):
    assert "training_config.learning_rate=" in completed(tmp_path, "train", "a.yaml", "training_config.learn")
    assert "peft_config.use_dora=" in completed(tmp_path, "train", "a.yaml", "peft_config.use_d")
    folder = colours["red"].parent
    assert set(completed(folder, "chat", "r")) == {"red"}
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    assert completed(tmp_path, "chat", "ru") == ["runs/"]
    assert completed(tmp_path, "chat", "runs/") == ["runs/mine"]


def test_the_record_of_old_runs_may_lack_the_system_turn(colours):
    assert TrainedRun(colours["red"]).system is None
