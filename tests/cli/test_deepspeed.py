"""Two real processes under DeepSpeed's ZeRO-3 on a CPU: what was trained is saved, and is what DDP trains."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from philora.models.loading import local_path
from tests.cli.test_processes import REPOSITORY, START, finished, largest_gap, launch, losses, settings_of
from tests.tolerances import LOSS_STEP_FP32

# `make deepspeed` puts it into a folder of its own.
FOLDER = Path(sys.prefix) / "deepspeed"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not FOLDER.is_dir() and importlib.util.find_spec("deepspeed") is None, reason="run `make deepspeed` first"
    ),
]

# Everything is shared out, however small; what to gather on saving is left unsaid, so DeepSpeed does not.
ZERO_3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    if FOLDER.is_dir():
        monkeypatch.syspath_prepend(str(FOLDER))
        monkeypatch.setenv("PATH", os.pathsep.join([str(FOLDER / "bin"), os.environ["PATH"]]))  # of ninja


@pytest.fixture(scope="module", params=["tied", "separate"])
def base(request, tmp_path_factory):
    """The bundled model, and one whose output head is a matrix of its own."""
    if request.param == "tied":
        return "nano"
    folder = tmp_path_factory.mktemp("separate")
    model = AutoModelForCausalLM.from_pretrained(local_path("nano"))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.01)
    model.save_pretrained(folder)
    for path in Path(local_path("nano")).iterdir():
        if path.name.startswith(("token", "special", "chat", "generation")):
            shutil.copy(path, folder)
    return str(folder)


def test_a_run_under_zero_3_keeps_what_it_trained(base, tmp_path):
    fixed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_strategy": "no", "max_steps": 3}
    runs = {}
    for name, changes in (("zero3", {"deepspeed": ZERO_3}), ("ddp", {})):
        settings = settings_of(tmp_path / name, **fixed, **changes)
        settings["model"]["name_or_path"] = base
        code, out, err = finished(launch(tmp_path / f"{name}-config", settings), seconds=550)
        assert code == 0, out + err
        runs[name] = tmp_path / name
    assert largest_gap(losses(runs["zero3"]), losses(runs["ddp"])) <= LOSS_STEP_FP32
    weights = {name: load_file(run / "adapter" / "adapter_model.safetensors") for name, run in runs.items()}
    assert weights["zero3"].keys() == weights["ddp"].keys()
    for key, each in weights["zero3"].items():
        difference = (each - weights["ddp"][key]).norm() / weights["ddp"][key].norm()
        assert difference <= 1e-2, key  # three steps of AdamW, which divides by small moments
        assert "lora_B" not in key or each.any(), f"{key} was not trained"
    results = {name: json.loads((run / "results.json").read_text(encoding="utf-8")) for name, run in runs.items()}
    after = {name: each["after"]["loss"] for name, each in results.items()}
    assert after["zero3"] == pytest.approx(after["ddp"], abs=1e-3)
    assert after["zero3"] < results["zero3"]["before"]["loss"]


SCRIPT = """
import json, sys
import philora
from datasets import Dataset
from peft import LoraConfig
from philora.models.loading import local_path
from transformers import AutoModelForCausalLM, AutoTokenizer

name = local_path("nano")
trainer = philora.SFTTrainer(
    AutoModelForCausalLM.from_pretrained(name),
    philora.SFTConfig(sys.argv[1], max_steps=2, save_strategy="no", report_to="none", bf16=False, max_length=64,
                      learning_rate=1e-2, gradient_checkpointing=False, deepspeed=json.loads(sys.argv[2])),
    train_dataset=Dataset.from_dict({"text": ["a few words"] * 64}),
    processing_class=AutoTokenizer.from_pretrained(name),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
)
trainer.train()
trainer.save_model(sys.argv[1] + "/saved")
"""


def test_a_script_under_zero_3_saves_what_it_trained(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    command = [*START[:-1], str(tmp_path / "script.py"), str(tmp_path), json.dumps(ZERO_3)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert saved
    assert all(each.any() for each in saved.values())
    assert (tmp_path / "saved" / "philora.json").is_file()
