"""What scripts rely on: JSON alone on standard output, an exit code for each outcome, completion in a real shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import philora
from philora.models.loading import local_path
from tests.cli.conftest import process

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(local_path("nano"))
    adapted = philora.get_peft_model(model, LoraConfig(r=4, target_modules=["qkv_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    folder = tmp_path_factory.mktemp("run") / "adapter"
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(local_path("nano")).save_pretrained(folder)
    return folder


def strictly(text: str) -> dict:
    """JSON as every reader takes it: one document, and no NaN."""

    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.slow
def test_every_command_that_reports_prints_json_alone(cli, config, adapter, tmp_path):
    path = config()
    settings = strictly(cli("config", path, "--json").out)
    assert settings["peft_config.r"] == {"value": 4, "from": str(path)}
    assert strictly(cli("check", path, "--json").out)["plan"]["steps"] == 4

    trained = strictly(cli("train", path, "--json").out)
    assert trained["adapter"] == str(tmp_path / "run" / "adapter")
    assert trained["after"]["loss"] > 0
    report = strictly(cli("report", tmp_path / "run", "--json").out)
    assert Path(report["report"]).is_file()
    quick = ("--answers", "2", "--max-new-tokens", "4", "--limit", "4", "--no-forgetting", "--metrics", "")
    assert strictly(cli("evaluate", tmp_path / "run", *quick, "--json").out)["comparison"]

    merged = strictly(cli("merge", adapter, "--out", tmp_path / "merged", "--json").out)
    assert merged["agreement"]["relative"] <= merged["agreement"]["bound"]
    exported = strictly(cli("export", adapter, "--out", tmp_path / "peft", "--json").out)
    assert exported["folder"] == str(tmp_path / "peft")
    assert exported["agreement"]["effect"] > 0
    pushed = strictly(cli("push", adapter, "me/x", "--base", "nano", "--dry-run", "--json").out)
    assert pushed["url"] is None
    assert "stop_tokens.json" in pushed["files"]


def test_with_json_a_fault_is_on_standard_error(cli):
    done = cli("check", "missing.yaml", "--json")
    assert done.code == 2
    assert done.out == ""
    assert "expected an existing file" in done.err


# ------------------------------------------------------------------------------------------- exit codes


def test_the_table_of_exit_codes_is_whole():
    """Each code has a test: 0, 1, 2 and 130 here, 3 and 143 in test_reliability.py by real signals."""
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == ["0", "1", "2", "3", "130", "143"]
    tests = (ROOT / "tests" / "cli" / "test_reliability.py").read_text(encoding="utf-8")
    assert "== 3\n" in tests
    assert "== 143\n" in tests


def test_what_fails_outside_of_what_was_asked_is_1(cli, adapter, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_nothing")
        done = cli("push", adapter, "me/x")
    assert done.code == 1
    assert "expected a connection" in done.err


def test_a_command_that_does_what_was_asked_is_0_and_wrong_use_is_2(cli, config):
    assert cli("config", config()).code == 0
    assert cli("config").code == cli("config", "--jsn").code == cli("cofnig").code == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_where_nothing_is_to_be_saved_is_130(adapter, tmp_path):
    answers = ("--data", "helpdesk", "--answers", "200", "--out", tmp_path / "out")
    with process("evaluate", adapter, "--base", "nano", *answers) as running:
        for line in running.stderr:
            if "evaluating" in line:
                break
        running.send_signal(signal.SIGINT)
        said = running.stderr.read()
    assert running.returncode == 130, said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash")
def test_completion_in_bash():
    """What `philora --show-completion bash` prints, in a real bash."""
    script = """
    eval "$(_PHILORA_COMPLETE=source_bash philora)"
    complete -p philora
    try() {
      COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
      _philora_completion philora; echo "${COMPREPLY[*]}"
    }
    try philora ex
    try philora export --format g
    try philora export --layout s
    try philora merge runs/x --max-
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=True)
    bound, *found = done.stdout.splitlines()
    assert "_philora_completion" in bound
    assert [each.split() for each in found] == [
        ["export", "explain"],
        ["gguf"],
        ["server", "slices"],
        ["--max-shard-size"],
    ]


def test_completion_has_the_words_of_the_formats():
    from philora.cli import commands as cli
    from philora.exporting.conversion import FILE_TYPES, FORMATS

    assert tuple(FORMATS) == cli.FORMATS
    assert set(cli.LAYOUTS) == {layout for layouts in FORMATS.values() for layout in layouts}
    assert cli.FILE_TYPES == FILE_TYPES
