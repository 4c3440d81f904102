"""Pushing to a small Hub on this machine: what arrives, what is said when it does not, and where the token is not."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import philora
from philora.errors import AdapterError, ConfigError, RunError
from philora.models.loading import local_path
from philora.models.locate import licence
from philora.reporting.card import model_card
from philora.reporting.pushing import push
from philora.runtime.hub import require_token
from tests.hub_server import TOKEN, hub_server


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/no/such/file")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


RESULTS = {
    "philora": philora.__version__,
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "before": {"loss": 7.5, "perplexity": 1808.0, "token_accuracy": 0.14, "label_tokens": 900},
    "after": {
        "loss": 0.25, "perplexity": 1.28, "token_accuracy": 0.989, "label_tokens": 900, "exact_match": 0.79,
        "exact_match_count": 79, "answers": 100,
    },
    "data": {"train": {"rows": 1234, "tokens": 56789}},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of the bundled model as `philora train` leaves it, with what must not be pushed."""
    folder = tmp_path_factory.mktemp("runs") / "helpdesk"
    model = AutoModelForCausalLM.from_pretrained(local_path("nano"))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = philora.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "down_proj.lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(local_path("nano")).save_pretrained(folder / "adapter")
    adapted.get_base_model().generation_config.save_pretrained(folder / "adapter")
    (folder / "adapter" / "optimizer.pt").write_text("not for others")
    settings = {
        "model": {"name_or_path": "nano", "dtype": "bfloat16"},
        "data": {"train": "/home/zz9/plural-z/conversations.jsonl"},
        "training_config": {"learning_rate": 0.004, "num_train_epochs": 3, "hub_model_id": "me/helpdesk"},
        "peft_config": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


def texts(files):
    return {name: content.decode() for name, content in files.items() if not name.endswith((".safetensors", ".model"))}


def test_an_adapter_arrives_whole(hub, run, tmp_path, capsys, caplog):
    with caplog.at_level(logging.DEBUG):
        result = push(run, "me/helpdesk", private=True)
    files = hub.repositories["me/helpdesk"]
    assert set(files) == set(result.files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "philora.json", "generation_config.json",
        "stop_tokens.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert hub.visibility == {"me/helpdesk": "private"}
    assert hub.commits == [("me/helpdesk", "Upload the adapter with philora")]
    assert result.url == f"{hub.url}/me/helpdesk/commit/abc123"
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "nano"
    assert [each["text"] for each in json.loads(files["stop_tokens.json"])["stop_tokens"]] == [
        "<|end|>",
        "<|endoftext|>",
    ]
    for name, content in files.items():
        assert TOKEN.encode() not in content, name
        assert b"plural-z" not in content, name
        assert b"site-packages" not in content, name
        assert str(run).encode() not in content, name
    said = capsys.readouterr()
    assert TOKEN not in said.out + said.err + caplog.text

    # What arrived is an adapter that PEFT loads, and the same one.
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    base = AutoModelForCausalLM.from_pretrained(local_path("nano"))
    got = PeftModel.from_pretrained(base, tmp_path)
    ids = torch.tensor([[1, 300, 400]])
    want = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(local_path("nano")), run / "adapter")
    assert torch.equal(got(input_ids=ids).logits, want(input_ids=ids).logits)
    again = push(run, "helpdesk")  # of the token's owner, and there already
    assert again.repo_id == "me/helpdesk"


@pytest.mark.slow
def test_a_merged_model_arrives_whole(hub, run, tmp_path):
    result = push(run / "adapter", "me/merged", merged=True)
    files = hub.repositories["me/merged"]
    assert {"model.safetensors", "config.json", "tokenizer.json", "stop_tokens.json", "README.md"} <= set(files)
    assert "adapter_model.safetensors" not in files
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.num_parameters() > 4e6
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert "merged" in card.data.tags
    assert result.url


def logits_of(files, folder):
    """What transformers computes from a repository: it puts an adapter that it finds there on the model."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=torch.tensor([[1, 300, 400]])).logits


@pytest.mark.slow
def test_a_merged_model_and_an_adapter_are_never_loaded_together(hub, run, tmp_path):
    push(run, "me/both")
    with pytest.raises(ConfigError, match=r"repo_id='me/both' - expected a repository without an adapter.*--replace"):
        push(run, "me/both", merged=True)
    assert len(hub.commits) == 1
    result = push(run, "me/both", merged=True, replace=True)
    assert set(result.removed) == {"adapter_config.json", "adapter_model.safetensors", "philora.json"}
    assert set(hub.repositories["me/both"]) == set(result.files)
    push(run, "me/merged", merged=True)
    want = logits_of(hub.repositories["me/merged"], tmp_path / "merged")
    assert torch.equal(logits_of(hub.repositories["me/both"], tmp_path / "both"), want)
    # The control: with the adapter's files left there, transformers adds the update twice.
    left = {name: hub.blobs.get(name, (run / "adapter" / name).read_bytes()) for name in ("adapter_model.safetensors",)}
    left["adapter_config.json"] = (run / "adapter" / "adapter_config.json").read_bytes()
    twice = logits_of({**hub.repositories["me/both"], **left}, tmp_path / "twice")
    assert not torch.allclose(twice, want, atol=1e-2)

    with pytest.raises(ConfigError, match=r"expected a repository without a model, since an adapter is pushed"):
        push(run, "me/both")
    result = push(run, "me/both", replace=True)
    assert {"model.safetensors", "config.json"} <= set(result.removed)
    assert set(hub.repositories["me/both"]) == set(result.files)


@pytest.mark.slow
def test_old_shards_go_and_other_files_stay(hub, run):
    old = {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "chat_template.json", "added_tokens.json",
    }  # fmt: skip
    mine = {"notes.md", "figures/model.safetensors", "LICENSE", ".gitattributes"}
    hub.repositories["me/merged"] = dict.fromkeys(old | mine, b"{}")
    result = push(run, "me/merged", merged=True)
    assert set(result.removed) == old
    assert set(hub.repositories["me/merged"]) == mine | set(result.files)
    hub.repositories["me/adapter"] = dict.fromkeys(("adapter_model.bin", "tokenizer.model", *mine), b"{}")
    assert set(push(run, "me/adapter").removed) == {"adapter_model.bin", "tokenizer.model"}


def test_a_dry_run_sends_nothing_and_needs_no_token(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = push(run, "me/helpdesk", dry_run=True)
    assert result.url is None
    assert result.files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert not hub.requests
    assert not hub.repositories


def test_the_card(run):
    text = model_card("me/helpdesk", run=run, base="nano", adapter_config={"r": 4})
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["library_name"] == "peft"
    assert data["license"] == "mit"
    assert data["pipeline_tag"] == "text-generation"
    assert {"philora", "lora"} <= set(data["tags"])
    metrics = {each["type"]: each["value"] for each in data["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"loss": 0.25, "token_accuracy": 0.989, "exact_match": 0.79}
    assert "| Loss | 7.500 | 0.250 | −7.250 |" in text
    assert "conversations.jsonl: 1,234 conversations, 56,789 tokens." in text
    assert "| learning_rate | 0.004 |" in text
    assert "| target_modules | down_proj, q_proj |" in text
    assert "torch 2.13.0" in text
    real = ModelCard(model_card("a/b", run=None, base="microsoft/Phi-4-mini-instruct", adapter_config={"r": 8})).data
    assert real.base_model == "microsoft/Phi-4-mini-instruct"
    assert real.license == "mit"
    assert licence("somebody/llama") is None


def test_everything_in_a_card_is_escaped(run, tmp_path):
    evil = "<img src=x onerror=alert(1)>`[me](javascript:alert(2))|\n\n# own heading"
    shutil.copytree(run, tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"]["train"] = [evil.replace("/", "")]
    settings["training_config"]["optim"] = settings["peft_config"]["target_modules"] = evil
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "run" / "results.json").write_text(json.dumps({**RESULTS, "versions": {evil: evil}}))
    base = 'x"); import os  # \n```\n' + evil.replace("/", "")
    text = ModelCard(model_card(f"me/{evil}", run=tmp_path / "run", base=base, adapter_config={"r": evil})).text
    parts = text.split("\n```")  # a fence ends at the beginning of a line only
    assert len(parts) == 3
    code = parts[1].removeprefix("python\n")
    calls = [each for each in ast.walk(ast.parse(code)) if isinstance(each, ast.Call)]
    assert {getattr(each.func, "attr", "print") for each in calls} == {
        "from_pretrained", "apply_chat_template", "generate", "decode", "print"}  # fmt: skip
    assert not [each for each in ast.walk(ast.parse(code)) if isinstance(each, ast.Import)]
    words = parts[0] + parts[2]
    assert "<img" not in words
    assert "\\`\\[me\\](" in words
    assert "`[me" not in words
    assert "\n# own" not in words
    tables = [line for line in words.splitlines() if line.startswith("| optim") or line.startswith("| target")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in tables] == [3, 3]


@pytest.mark.parametrize("merged", [False, True])
def test_the_code_of_the_card_runs(merged, run, tmp_path, monkeypatch, capsys):
    if merged:
        philora.merge_to_folder(run, tmp_path / "here", verify=False)
    monkeypatch.chdir(tmp_path if merged else run)
    name = "here" if merged else "adapter"
    text = model_card(name, run=run, base="nano", adapter_config={}, merged=merged)
    code = text.split("```python\n")[1].split("```")[0].replace("128", "4")
    exec(code, {})
    assert capsys.readouterr().out.strip()


def test_secrets_in_settings_are_no_part_of_a_card(run, tmp_path):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["training_config"] |= {"hub_token": TOKEN, "optim": TOKEN}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert TOKEN not in model_card("x/y", run=tmp_path, base="nano", adapter_config={})


# ------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("name", ["a b", "a/b/c", "x--y", "name.", "https://huggingface.co/me/x", ""])
def test_names_that_no_repository_can_have(name, hub, run):
    with pytest.raises(ConfigError, match=r"push: repo_id=.* - expected a repository such as OWNER/NAME"):
        push(run, name)
    assert not hub.requests


def test_without_a_token(hub, run, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"token=None - expected a token with write access. Set HF_TOKEN, or log in"):
        push(run, "me/x")
    assert not hub.requests


def test_where_the_token_is_found(hub, monkeypatch, tmp_path):
    assert require_token("run", "hf_given") == "hf_given"
    assert require_token("run") == TOKEN
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")  # a secret of another program
    (tmp_path / "login").write_text("of_the_login")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    assert require_token("run") == "of_the_login"


def test_what_the_hub_refuses_is_one_message_without_the_token(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(ConfigError, match=r"token='\*\*\*' - expected a token that the hub knows") as raised:
        push(run, "me/x")
    assert "hf_wrong" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuse = ("/commit/", 403, f"You have no rights with {TOKEN}")
    with pytest.raises(
        ConfigError, match=r"repo_id='me/x' - expected a repository that the token may write to"
    ) as raised:
        push(run, "me/x")
    assert TOKEN not in str(raised.value)
    hub.refuse = ("/commit/", 413, "Too large")
    with pytest.raises(RunError, match=r"expected the hub to take the files"):
        push(run, "me/x")
    assert hub.repositories["me/x"] == {}


def test_without_a_network(run, monkeypatch, hub):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    with pytest.raises(
        RunError, match=r"expected a connection to http.*Connect and try again; nothing is lost. ConnectErr"
    ):
        push(run, "me/x")


def test_only_peft_folders(tmp_path, hub):
    (tmp_path / "lora.pt").touch()
    with pytest.raises(AdapterError, match=r"expected an adapter in PEFT's format. Convert it first: philora export"):
        push(tmp_path / "lora.pt", "me/x", base="nano")


# ---------------------------------------------------------------------------------- the command, and a run


@pytest.mark.slow
def test_the_command(hub, run, tmp_path):
    """A real process, with the token and the Hub's address in the environment."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    command = [sys.executable, "-m", "philora", "--debug", "push", str(run), "me/helpdesk", "--private"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in done.stdout
    assert f"{hub.url}/me/helpdesk/commit/abc123" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert "adapter_model.safetensors" in hub.repositories["me/helpdesk"]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def settings_of(tmp_path, **training):
    return {
        "model": {"name_or_path": "nano", "dtype": "float32"},
        "data": {"train": {"path": "helpdesk", "limit": 40}, "eval": {"path": "helpdesk", "limit": 8}},
        "evaluation": {"generate": 2, "max_new_tokens": 4, "samples": 1},
        "training_config": {
            "max_steps": 2, "max_length": 128, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
            "output_dir": str(tmp_path / "my-run"), "push_to_hub": True, **training,
        },
        "peft_config": {"r": 2},
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_pushes_its_adapter(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    settings = settings_of(tmp_path, hub_token=TOKEN, hub_private_repo=True)
    done = philora.train(settings, command=f"philora train x.yaml training_config.hub_token={TOKEN}")
    assert hub.visibility == {"me/my-run": "private"}
    files = hub.repositories["me/my-run"]
    assert files["adapter_model.safetensors"] == (done.adapter / "adapter_model.safetensors").read_bytes()
    metrics = ModelCard(files["README.md"].decode()).data.to_dict()["model-index"][0]["results"][0]["metrics"]
    assert {each["type"]: each["value"] for each in metrics}["loss"] == done.results["after"]["loss"]
    assert "## Results" in (done.adapter / "README.md").read_text()
    for path in done.folder.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path
    assert len(hub.commits) == 1


def test_a_run_that_cannot_push_does_not_begin(hub, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"training_config.hub_model_id='a b' - expected a repository such as"):
        philora.train(settings_of(tmp_path, hub_model_id="a b"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    with pytest.raises(ConfigError, match=r"token='\*\*\*' - expected a token that the hub knows"):
        philora.train(settings_of(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["me/my-run"] = {"model.safetensors": b""}
    with pytest.raises(ConfigError, match=r"repo_id='me/my-run' - expected a repository without a model"):
        philora.train(settings_of(tmp_path))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"token=None - expected a token with write access"):
        philora.train(settings_of(tmp_path))
    assert not (tmp_path / "my-run").exists()


@pytest.mark.slow
def test_a_run_whose_push_fails_is_whole(hub, tmp_path, monkeypatch):
    hub.refuse = ("/commit/", 500, "down")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(RunError, match=r"complete in .*my-run; push it with: philora push .*my-run me/my-run"):
        philora.train(settings_of(tmp_path))
    assert (tmp_path / "my-run" / "results.json").is_file()
    hub.refuse = None
    assert push(tmp_path / "my-run", "me/my-run").url
