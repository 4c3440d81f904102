"""`philora export` and `philora merge` as commands."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import philora
from philora.models.loading import local_path
from philora.models.verify import logits_of, probe


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the bundled model with random values, in a run folder."""
    model = AutoModelForCausalLM.from_pretrained(local_path("nano"))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = philora.get_peft_model(model, config)
    torch.manual_seed(0)
    for module in philora.adapters.slices.lora_layers(adapted).values():
        for part in getattr(module, "slices", {}).get("default", ((None, 0, None, 0, None),)):
            torch.nn.init.normal_(module.lora_B["default"].weight[part[1] : part[2], part[3] : part[4]], std=0.02)
    run = tmp_path_factory.mktemp("run")
    adapted.save_pretrained(run / "adapter")
    return run, logits_of(adapted, probe(adapted.config.vocab_size))


def test_there_and_back(adapter, tmp_path, cli):
    run, want = adapter
    done = cli("export", run, "--format", "loralib", "--out", tmp_path / "lib")
    assert done.code == 0, done.err
    assert "loralib, verified" in done.out
    assert "the adapter moves the base by" in done.out
    done = cli("export", tmp_path / "lib/lora.pt", "--base", "nano", "--out", tmp_path / "server")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "server" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    model = AutoModelForCausalLM.from_pretrained(local_path("nano"))
    loaded = philora.load_adapter(model, tmp_path / "server")
    assert (logits_of(loaded, probe(model.config.vocab_size)) - want).abs().max() < 1e-4 * want.abs().max()


def test_merge(adapter, tmp_path, cli):
    run, want = adapter
    done = cli("merge", run, "--out", tmp_path / "merged", "--max-shard-size", "4MB")
    assert done.code == 0, done.err
    assert "file(s)" in done.out
    assert "largest difference of a logit" in done.out
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    got = logits_of(model, probe(model.config.vocab_size))
    assert (got - want).norm() < 5e-2 * want.norm()  # rounded once to the base's bf16
    again = cli("merge", run, "--out", tmp_path / "merged")
    assert again.code == 2
    assert "empty" in again.err


@pytest.mark.slow
def test_gguf_and_ollama(adapter, tmp_path, cli):
    run, _ = adapter
    done = cli("export", run, "--format", "ollama", "--dtype", "q8_0", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "ollama, verified" in done.out
    assert "read back: KL divergence" in done.out
    assert "llama.cpp" in done.out  # its figures, or that it is not installed
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "Modelfile", "README.md", "model-q8_0.gguf", "stop_tokens.json",
    ]  # fmt: skip


def test_bad_input(adapter, tmp_path, cli):
    run, _ = adapter
    for arguments, message in (
        (("export", run, "--format", "ggml", "--out", tmp_path / "x"), "format='ggml' - expected one of"),
        (("export", run / "nothing", "--out", tmp_path / "x"), "expected a run folder, an adapter folder"),
        (("merge", run / "nothing", "--out", tmp_path / "x"), "expected a run folder, an adapter folder"),
    ):
        done = cli(*arguments)
        assert done.code == 2, done
        assert message in " ".join(done.err.split())
        assert "Traceback" not in done.err
    assert not (tmp_path / "x").exists()
