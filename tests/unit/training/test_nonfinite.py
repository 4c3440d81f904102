"""Nothing in a training step waits for the device: whole steps on a CPU that may not read, and on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import philora
from philora.kernels import attention
from philora.kernels.layout import LABELS
from philora.models.loading import local_path
from philora.training.collation import HostLayout
from philora.training.microbatches import numbers
from philora.training.nonfinite import NonFiniteError, reads_late
from tests.conftest import make_phi3
from tests.waiting import Waits, no_waiting

LENGTHS = [5, 1, 18]


def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


MODELS = {"phi3": make_phi3, "phi3 with a window": lambda: make_phi3(sliding_window=7), "llama": llama}


def trainer(folder: Any, model: Any, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 97, (sum(LENGTHS),), generator=generator).tolist() for _ in range(12)]
    labels = [[-100 if at % 3 else each for at, each in enumerate(row)] for row in rows]
    columns = {"input_ids": rows, "labels": labels}
    packing = settings.get("packing", True)
    arguments = philora.SFTConfig(
        str(folder),
        **{
            "max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
            "bf16": False, "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False, "packing": True,
            "max_length": sum(LENGTHS), "save_strategy": "no", "dataset_kwargs": {"skip_prepare_dataset": True},
            "logging_steps": 10, "report_to": "none", "disable_tqdm": True, "optim": "adamw_torch_fused",
            "max_nonfinite_steps": 2, **settings,
        },
    )  # fmt: skip
    return philora.SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict(columns | ({"seq_lengths": [LENGTHS] * len(rows)} if packing else {})),
        processing_class=AutoTokenizer.from_pretrained(local_path("nano")),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )


def late(made: Any, monkeypatch: Any) -> Any:
    """Have a trainer on a CPU read the figures of a step late, as on a GPU."""
    monkeypatch.setattr(made.nonfinite, "_late_optimizer", lambda: made.optimizer.optimizer)
    return made


def adapter(made: Any) -> torch.Tensor:
    return torch.cat([each.detach().flatten() for name, each in made.model.named_parameters() if "lora_" in name])


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded rows"])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_reads_nothing(tmp_path, monkeypatch, model, packing):
    made = late(trainer(tmp_path, MODELS[model](), packing=packing, per_device_train_batch_size=2), monkeypatch)
    with no_waiting(made, monkeypatch):
        made.train()
    logged = [each for each in made.state.log_history if "mean_token_accuracy" in each]
    assert all(isinstance(each, int | float) for each in logged[-1].values())
    tokens = 3 * 2 * 2 * sum(LENGTHS)
    assert (logged[-1]["num_tokens"], made.trained_tokens) == (tokens, tokens)


@pytest.mark.parametrize(
    "fault",
    [
        lambda made, patch: patch.setattr(made.nonfinite, "_late_optimizer", lambda: None),
        lambda made, patch: patch.setattr(HostLayout, "__call__", lambda self, examples: self.collate(examples)),
        lambda made, patch: patch.setattr(made, "_has_plain_loss", lambda: False),
        lambda made, patch: patch.setattr(attention, "without_marker", lambda mask: mask),
    ],
    ids=["finiteness", "layout", "metrics", "mask"],
)
def test_a_planted_wait_is_found(tmp_path, monkeypatch, fault):
    made = late(trainer(tmp_path, llama()), monkeypatch)
    fault(made, monkeypatch)
    with no_waiting(made, monkeypatch), pytest.raises((Waits, RuntimeError)):
        made.train()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path, monkeypatch, model, dtype):
    monkeypatch.setenv("PHILORA_STACK", "all")  # no GPU has read figures late yet
    made = trainer(tmp_path, MODELS[model]().to(dtype), max_steps=5)
    get, look = made.get_batch_samples, made._maybe_log_save_evaluate
    moved = []

    def samples(*args):
        # The first steps choose kernels and make the optimizer's state. From then on batches are made, counted and
        # moved under the same rule as the step itself.
        torch.cuda.set_sync_debug_mode("error" if made.state.global_step >= 2 else "default")
        moved.append(torch.cuda.get_sync_debug_mode())
        return get(*args)

    def log_and_save(*args, **kwargs):
        if made.outcome_matters():
            torch.cuda.set_sync_debug_mode("default")
        return look(*args, **kwargs)

    monkeypatch.setattr(made, "get_batch_samples", samples)
    monkeypatch.setattr(made, "_maybe_log_save_evaluate", log_and_save)
    try:
        made.train()
        assert moved == [0, 0, 2, 2, 2], "2: errors"
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(RuntimeError):
            adapter(made).sum().item()  # a planted fault
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------------------- figures read late


def poisoned(made: Any, steps: set[int], monkeypatch: Any) -> Any:
    """Let the losses of some steps be no number."""
    compute = made.compute_loss

    def loss(*args, **kwargs):
        found = compute(*args, **kwargs)
        return found * float("nan") if made.state.global_step + 1 in steps else found

    monkeypatch.setattr(made, "compute_loss", loss)
    return made


@pytest.mark.parametrize(
    ("change", "late"),
    [
        ({}, True),
        ({"kind": "cpu"}, False),
        ({"fused": False}, False),
        ({"scaled": True}, False),
        ({"switch": ""}, False),
        ({"switch": "0"}, False),
    ],
)
def test_when_figures_are_read_late(change, late):
    assert reads_late(**{"kind": "cuda", "fused": True, "scaled": False, "switch": "all"} | change) is late


@pytest.mark.slow
def test_a_step_that_is_left_out_late_leaves_what_one_left_out_at_once_leaves(tmp_path, monkeypatch, caplog):
    settings: dict[str, Any] = {"max_steps": 5, "lr_scheduler_type": "linear", "warmup_steps": 2, "logging_steps": 2}
    at_once = poisoned(trainer(tmp_path / "a", make_phi3(), **settings), {2, 4}, monkeypatch)
    at_once.train()
    said = [each.getMessage() for each in caplog.records if "is skipped" in each.getMessage()]
    caplog.clear()
    read_late = poisoned(late(trainer(tmp_path / "b", make_phi3(), **settings), monkeypatch), {2, 4}, monkeypatch)
    read_late.train()
    assert torch.equal(adapter(read_late), adapter(at_once))
    assert [each.getMessage() for each in caplog.records if "is skipped" in each.getMessage()] == said
    assert len(said) == 2
    logs = [
        [(each["loss"], each["learning_rate"]) for each in made.state.log_history if "loss" in each]
        for made in (at_once, read_late)
    ]
    assert logs[0] == logs[1]
    assert all(each == each for each, _ in logs[0]), "losses that are no number stay out of the log"
    without = late(trainer(tmp_path / "c", make_phi3(), **settings), monkeypatch)
    monkeypatch.setattr(type(without.nonfinite), "_restore_schedule", lambda *_: None)  # a planted fault
    poisoned(without, {2, 4}, monkeypatch).train()
    assert not torch.equal(adapter(without), adapter(at_once))


def test_too_many_steps_in_a_row_end_the_training_late_too(tmp_path, monkeypatch):
    made = poisoned(late(trainer(tmp_path, make_phi3(), max_steps=5), monkeypatch), {2, 3}, monkeypatch)
    before = None
    train = made.training_step

    def step(*args, **kwargs):
        nonlocal before
        before = copy.deepcopy(adapter(made)) if made.state.global_step == 1 else before
        return train(*args, **kwargs)

    monkeypatch.setattr(made, "training_step", step)
    with pytest.raises(NonFiniteError, match=r"step 3: training_config\.max_nonfinite_steps"):
        made.train()
    assert torch.equal(adapter(made), before)
    written = (tmp_path / "nonfinite_examples.json").read_text()
    assert '"step": 3' in written
    assert '"loss": "nan"' in written


# ---------------------------------------------------------------------------------------------------- the batch


def test_the_collator_counts_on_the_host(tmp_path):
    made = trainer(tmp_path, make_phi3())
    batch = next(iter(made.get_train_dataloader()))
    assert batch["document_lengths"] == tuple(LENGTHS)
    rows, ids = (batch[name] for name in LABELS)
    labels = batch["labels"]
    assert torch.equal(labels.flatten()[rows + 1], ids)
    assert len(rows) == int((labels[:, 1:] != -100).sum())
    assert type(made.data_collator).__name__ == "DataCollatorForLanguageModeling", "what people see is TRL's"


def test_numbers_are_read_as_what_they_are():
    values = [torch.tensor(0.5), 3, torch.tensor((1 << 40) + 1), 0.25]
    assert numbers(values) == [0.5, 3, (1 << 40) + 1, 0.25]
    assert type(numbers(values)[2]) is int
