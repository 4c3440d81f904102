"""philora's trainer follows TRL + PEFT step by step: same initial A and B, data order, labels and seed, dropout 0."""

from __future__ import annotations

import json

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import philora
from philora.adapters.fast_layers import FastLinear
from philora.models.loading import local_path
from tests.tolerances import LOSS_STEP_BF16, LOSS_STEP_FP32

STEPS = 20


@pytest.fixture(scope="module")
def rows():
    from importlib import resources

    path = resources.files("philora") / "nano" / "helpdesk" / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:60]
    return Dataset.from_list([json.loads(line) for line in lines])


def losses(trainer_class, config_class, rows, folder, dtype, packing, targets="all-linear", change=None):
    tokenizer = AutoTokenizer.from_pretrained(local_path("nano"))
    model = AutoModelForCausalLM.from_pretrained(local_path("nano"), dtype=dtype)
    args = config_class(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        logging_steps=1,
        report_to="none",
        bf16=dtype is torch.bfloat16,
        use_cpu=True,
        packing=packing,
        max_length=128,
        assistant_only_loss=True,
        seed=3,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    config = LoraConfig(r=8, lora_alpha=20, target_modules=targets, task_type="CAUSAL_LM")
    trainer = trainer_class(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=config)
    if change is not None:
        change(trainer)
    trainer.train()
    fast = sum(isinstance(module, FastLinear) for module in trainer.model.modules())
    assert bool(fast) == (trainer_class is philora.SFTTrainer)
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def scaling_off_by_two_percent(trainer):
    for module in trainer.model.modules():
        if isinstance(module, FastLinear):
            module.scaling["default"] *= 1.02


def label_shifted(trainer):
    rows = trainer.train_dataset
    trainer.train_dataset = rows.map(lambda row: {"labels": [row["labels"][-1], *row["labels"][:-1]]})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "packing", "tolerance"),
    [
        pytest.param(torch.float32, False, LOSS_STEP_FP32, marks=pytest.mark.slow),
        (torch.float32, True, LOSS_STEP_FP32),
        pytest.param(torch.bfloat16, True, LOSS_STEP_BF16, marks=pytest.mark.slow),
    ],
)
def test_losses_follow_trl(rows, tmp_path, dtype, packing, tolerance):
    theirs = losses(trl.SFTTrainer, trl.SFTConfig, rows, tmp_path, dtype, packing)
    mine = losses(philora.SFTTrainer, philora.SFTConfig, rows, tmp_path, dtype, packing)
    assert len(mine) == STEPS
    assert theirs[0] - theirs[-5:].mean() > 10 * tolerance, "nothing was learned: the comparison could not fail"
    assert (mine - theirs).abs().max() <= tolerance
    assert (mine - theirs).mean().abs() <= tolerance / 4, "the gap leans to one side"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [scaling_off_by_two_percent, label_shifted])
def test_a_planted_fault_shows(rows, tmp_path, fault):
    theirs = losses(trl.SFTTrainer, trl.SFTConfig, rows, tmp_path, torch.float32, True)
    faulty = losses(philora.SFTTrainer, philora.SFTConfig, rows, tmp_path, torch.float32, True, change=fault)
    assert (faulty - theirs).abs().max() > LOSS_STEP_FP32


@pytest.mark.slow
def test_slices_train_through_the_trainer(rows, tmp_path):
    targets = ["q_proj", "v_proj", "gate_proj"]
    got = losses(philora.SFTTrainer, philora.SFTConfig, rows, tmp_path, torch.float32, True, targets)
    assert got[-5:].mean() < got[0]
