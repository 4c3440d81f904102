"""Each example runs on the bundled model and data, with its own settings and a few steps."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import philora
from philora.configuration.config import load_config
from philora.configuration.spellings import translate_training_arguments
from philora.models.loading import local_path
from philora.training.readiness import preflight
from tests.hub_server import TOKEN, hub_server

EXAMPLES = Path(__file__).parents[2] / "examples"
CHATS, CODE = (str(EXAMPLES / "data" / name) for name in ("conversations.jsonl", "python_code.jsonl"))

SMALL = ("--limit", "40", "--answers", "2", "--max-new-tokens", "8")

needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="quantised base")
needs_rouge = pytest.mark.skipif(not importlib.util.find_spec("rouge_score"), reason="ROUGE")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs an example in this process, from an empty folder, and gives what it printed and its `--out`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(name: str, data: str, *arguments: str) -> tuple[str, Path]:
        main = runpy.run_path(str(EXAMPLES / name))["main"]
        main(["--model", "nano", "--data", data, "--max-steps", "2", "--out", "out", *arguments])
        return capsys.readouterr().out, tmp_path / "out"

    return run


def targets(adapter: Path) -> set[str]:
    names = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.slow
@needs_bitsandbytes
def test_inference_quantization_and_fine_tuning(run):
    shown, out = run("Phi_3_Inference_Finetuning.py", CHATS, "--limit", "40", "--max-new-tokens", "8")
    sizes = [float(each) for each in re.findall(r"quantization (?:none|nf4): ([\d.]+) MB", shown)]
    assert len(sizes) == 2
    assert sizes[1] < 0.7 * sizes[0]
    assert shown.count("C# code") == 2
    before, after = map(float, re.search(r"held-out conversations: ([\d.]+) -> ([\d.]+)", shown).groups())
    assert after < before
    assert targets(out / "adapter") == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["training_config"]["optim"] == "paged_adamw_32bit"
    assert written["training_config"]["per_device_train_batch_size"] == 7


def test_sampled_answers_follow_from_the_seed(run):
    example = runpy.run_path(str(EXAMPLES / "Phi_3_Inference_Finetuning.py"))
    answers = []
    for _ in range(2):
        torch.rand(3)
        answers.append(example["answer"]("nano", "none", 12))
    assert answers[0] == answers[1]


@needs_bitsandbytes
def test_script(run):
    shown, out = run("FineTrainingScript.py", CHATS, "--limit", "40")
    assert float(re.search(r"held-out loss: ([\d.]+)", shown)[1]) > 0
    weights = load_file(out / "adapter_model.safetensors")
    assert all(".lora_" in name for name in weights)
    assert any(each.abs().max() > 0 for name, each in weights.items() if "lora_B" in name)


@pytest.mark.slow
@needs_rouge
def test_code_generation(run, tmp_path, monkeypatch):
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        shown, out = run("Phi-3-finetune-lora-python.py", CODE, *SMALL, "--push", "me/phi-python")
    assert "adapter_model.safetensors" in hub.repositories["me/phi-python-LoRA"]
    assert "model.safetensors" in hub.repositories["me/phi-python"]
    assert re.search(r"ROUGE-1 [\d.]+  ROUGE-2 [\d.]+  ROUGE-L [\d.]+  ROUGE-Lsum [\d.]+", shown)
    record = (out / "run" / "adapter" / "philora.json").read_text()
    assert {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} <= set(re.findall(r"\w+_proj", record))
    assert AutoModelForCausalLM.from_pretrained(out / "merged").dtype is torch.bfloat16
    train, test = (set((out / "data" / name).read_text().splitlines()) for name in ("train.jsonl", "test.jsonl"))
    assert len(test) == 2
    assert not train & test
    if importlib.util.find_spec("wandb"):
        import wandb

        wandb.finish()
        wandb.teardown()  # what it wrote last is in the file when its process has ended, not when the run has
        (logged,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
        assert b"eval/loss" in logged.read_bytes()


@pytest.mark.slow
@needs_bitsandbytes
@needs_rouge
def test_qlora(run, caplog):
    shown, out = run("Phi-3-finetune-qlora-python.py", CODE, *SMALL)
    assert "ROUGE-Lsum" in shown
    assert "no longer zero" not in caplog.text
    assert '"nf4"' in (out / "run" / "adapter" / "philora.json").read_text()
    fresh = AutoModelForCausalLM.from_pretrained(local_path("nano"))
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert not hasattr(merged.config, "quantization_config")
    name = "model.layers.0.mlp.down_proj.weight"
    moved = (merged.get_parameter(name) - fresh.get_parameter(name)).float().norm() / fresh.get_parameter(name).norm()
    assert 0 < moved < 0.01  # two small steps away from the fresh weights; nf4's rounding alone is about 0.1


def test_rouge_is_the_mean_of_f(monkeypatch):
    """One answer right, one half right: half of its words, all of them in the reference, so F = 2/3."""
    pytest.importorskip("rouge_score")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    rouge = runpy.run_path(str(EXAMPLES / "python_code.py"))["rouge"]
    scores = rouge(["print one", "print"], ["print one", "print two"])
    assert scores["ROUGE-1"] == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_the_model_cards_settings_are_the_same_in_both_forms():
    script = runpy.run_path(str(EXAMPLES / "sample_finetune.py"))
    config = load_config(EXAMPLES / "sample_finetune.yaml")
    assert not config.notices
    published, _ = translate_training_arguments(script["training_config"])
    for name, value in published.items():
        if name != "bf16":  # of the run: weights in bf16 without autocast
            assert config.training_config[name] == value, name
    for name, value in script["peft_config"].items():
        assert config.peft_config[name] == value, name


@pytest.mark.slow
def test_the_yaml_form_is_checked_and_trains(tmp_path):
    here = ["model.name_or_path=nano", "data.train={path: helpdesk, limit: 20}", "data.eval={path: helpdesk, limit: 4}"]
    here.append("training_config.max_steps=6")  # of one step all would be warm-up, which is refused
    assert preflight(EXAMPLES / "sample_finetune.yaml", here).coverage.trainable_parameters > 0
    short = [f"training_config.output_dir={tmp_path / 'run'}"]
    result = philora.train(EXAMPLES / "sample_finetune.yaml", [*here, *short, "evaluation.generate=0"])
    assert (result.adapter / "adapter_model.safetensors").is_file()


def test_the_page_names_every_example_and_link():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".yaml"):
            assert f"({path.name})" in page, path.name
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page):
        assert (EXAMPLES / target).exists(), target
    for command in re.findall(r"`(?:python|philora train|philora check) (examples/\S+)", page):
        assert (EXAMPLES.parent / command).exists(), command
    for yaml_file in EXAMPLES.glob("*.yaml"):
        load_config(yaml_file)
