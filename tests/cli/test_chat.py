"""`philora chat` and `philora serve` as commands."""

from __future__ import annotations

import io
import json
import re
import socket
import sys

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

import philora
from philora.models.loading import load_model
from tests.adapters_of_nano import NANO
from tests.conftest import COLOURS


@pytest.fixture
def piped(cli, monkeypatch):
    """Runs `philora chat` with lines on standard input."""

    def run(*arguments, text=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return cli("chat", *arguments)

    return run


def test_a_script_talks_over_a_pipe(piped, colours):
    answer = piped(colours["red"], "--max-new-tokens", "40", text="Who are you?\n/base\nWho are you?")
    assert answer.code == 0
    red, base = answer.out.splitlines()
    assert red == COLOURS["red"] != base
    assert "the base answers" in answer.err


def test_a_script_learns_that_something_could_not_be_done(piped, colours):
    answer = piped(colours["red"], text="/nonsense\nWho are you?\n" + "word " * 2100)
    assert answer.code == 2
    assert answer.out == COLOURS["red"] + "\n"
    assert "command='/nonsense' - expected a command" in " ".join(answer.err.split())
    assert "expected fewer than the model's 2048. Shorten the messages." in " ".join(answer.err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "runs/missing"], r"source='runs/missing' - expected a run folder"),
        (["chat", "RED", "--top-p", "0.5"], r"top_p=0.5 - expected a temperature above 0 beside it"),
        (["serve", "RED", "RED/adapter"], r"name='red' - expected a different name for each adapter"),
        (
            ["serve", "RED", "--host", "0.0.0.0"],
            r"host='0.0.0.0' - expected a key where other machines",
        ),
        (["chat", "RED", "--web", "--port", "70000"], r"'--port': .* less than or equal to 65535"),
        (["chat", "RED", "--web", "--top-k", "5"], r"--top-k=5 - expected no such option with --web. Leave it out"),
        (["serve"], r"Missing argument"),
    ],
)
def test_bad_input(cli, colours, monkeypatch, arguments, message):
    monkeypatch.delenv("PHILORA_API_KEY", raising=False)
    answer = cli(*(each.replace("RED", str(colours["red"])) for each in arguments))
    assert answer.code == 2
    assert re.search(message, " ".join(re.sub("[│╭╮╰╯─]", " ", answer.err).split())), answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize("arguments", [["serve"], ["chat", "--web"]])
def test_a_port_in_use_is_told_before_anything_is_loaded(cli, arguments):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = cli(*arguments, "there-is-no-such-run", "--port", taken.getsockname()[1])
    assert answer.code == 2
    assert "expected an address of this machine and a free port" in " ".join(answer.err.split())


@pytest.mark.parametrize("arguments", [["serve"], ["chat", "--web"]])
def test_without_the_extra(cli, monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "philora.serving.app", raising=False)
    answer = cli(*arguments, "run")
    assert answer.code == 2
    assert "serve='uvicorn' - expected uvicorn and starlette. Install them: pip install 'philora[serve]'" in " ".join(
        answer.err.split()
    )


SERVED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"}
"""Modules of Phi-3 in vLLM that take an adapter."""


def not_read_by_vllm(folder):
    """What vLLM would refuse in a folder, or pass over without a word.

    Source: vLLM's `lora/peft_helper.py` (`_validate_features`, `from_dict`: a rank and an alpha for all modules),
    `config/lora.py` (`MaxLoRARanks`), and `lora/lora_model.py` (`check_unexpected_modules`: a tensor's module is the
    last part of its name) as of November 2026.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {name: re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name) for name in tensors}
    parts = {name: found[1].rpartition(".")[2] for name, found in named.items() if found}
    ranks = {tensors[name].shape[0 if found[2] == "A" else 1] for name, found in named.items() if found}
    wrong = {
        "names": [name for name, found in named.items() if found is None],
        "modules": sorted(set(parts.values()) - SERVED),
        "targets": not (isinstance(config["target_modules"], list) and set(config["target_modules"]) <= SERVED),
        "ranks": ranks != {config["r"]},
        "largest rank": config["r"] > 512,
        "switches": [each for each in ("use_dora", "modules_to_save") if config.get(each)],
        "patterns": [each for each in ("rank_pattern", "alpha_pattern") if config.get(each)],
        "bias": config["bias"] != "none",
    }
    return {name for name, value in wrong.items() if value}


def test_what_is_exported_for_servers_is_what_vllm_reads(cli, tmp_path):
    adapter, folder = tmp_path / "slices", tmp_path / "server"
    config = LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = philora.get_peft_model(load_model(NANO), config)
    model.save_pretrained(str(adapter))
    assert not_read_by_vllm(adapter) == {"patterns", "ranks"}, "the control: as it was trained"
    assert cli("export", adapter, "--format", "peft", "--layout", "server", "--out", folder).code == 0
    assert not_read_by_vllm(folder) == set()
    written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert set(written["target_modules"]) == {"qkv_proj", "o_proj"}
