"""The contestants that run in philora's own environment: TRL with PEFT, and philora.

`python -m benchmarks.contestants TASK OUT` trains one of them and writes its figures to OUT. All get the same packs
as a dataset with `input_ids`, `labels` and `seq_lengths`, which is what TRL's own packing makes of conversations.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from benchmarks.process import Record, Task, run
from benchmarks.work import IGNORED, Document

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")

# What every contestant's trainer and adapter are given, here and on a GPU.
TRAINER: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "packing": True,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "train_sampling_strategy": "sequential",
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
LORA: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "bias": "none",
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


@dataclass(frozen=True)
class Setting:
    """Describe how a contestant trains."""

    title: str
    philora: bool
    dropout: float
    recompute: bool | str
    autocast: bool


CONTESTANTS = {
    # Phi-3's model card: sample_finetune.py, what matters for speed.
    "trl-card": Setting("TRL+PEFT, model card", False, 0.05, True, True),
    "trl-best": Setting("TRL+PEFT, best setting", False, 0.05, False, True),
    "trl-best-0": Setting("TRL+PEFT, best, no dropout", False, 0.0, False, True),
    "trl-pure-0": Setting("TRL+PEFT, no autocast, no dropout", False, 0.0, False, False),
    # As `philora train` sets its trainer up when the weights are bf16.
    "philora": Setting("philora", True, 0.05, False, False),
    "philora-0": Setting("philora, no dropout", True, 0.0, False, False),
    "philora-elementwise": Setting("philora, element-wise recomputation", True, 0.05, "elementwise", False),
    "philora-full": Setting("philora, full recomputation", True, 0.05, True, False),
}


def dataset_of(steps: list[list[list[Document]]]) -> Any:
    """The packs as TRL's packing would leave them, one row each, in the order of training."""
    from datasets import Dataset

    rows = [row for step in steps for row in step]
    return Dataset.from_dict(
        {
            "input_ids": [[int(token) for item in row for token in item.input_ids] for row in rows],
            "labels": [[int(label) for item in row for label in item.labels] for row in rows],
            "seq_lengths": [[len(item.input_ids) for item in row] for row in rows],
        }
    )


def facts_of(model: Any) -> dict[str, Any]:
    """Return a description of an adapted model, for a contestant's settings."""
    trainable = [item for item in model.parameters() if item.requires_grad]
    return {
        "weights": str(model.get_base_model().dtype).removeprefix("torch."),
        "adapters": "/".join(sorted({str(item.dtype).removeprefix("torch.") for item in trainable})),
        "trainable_parameters": sum(item.numel() for item in trainable),
        "attention": model.config._attn_implementation,
    }


def train(task: Task) -> dict[str, Any]:
    """Train as the task says, with the trainer of the contestant."""
    import torch
    import transformers
    import trl
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    setting = CONTESTANTS[task.contestant]
    if setting.philora:
        from philora import SFTConfig, SFTTrainer
    else:
        from trl import SFTConfig, SFTTrainer
    steps = task.read()
    record = Record(task.warmup)

    class Measured(SFTTrainer):  # type: ignore[misc,valid-type]
        """The trainer, with a count of what each forward pass is given."""

        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            # A pack comes without an attention mask and without padding.
            record.batch(int((inputs["labels"][:, 1:] != IGNORED).sum()), inputs["position_ids"].numel())
            return super().training_step(model, inputs, *rest, **more)

    class Steps(TrainerCallback):  # type: ignore[misc]
        """Ends a step when its loss is known."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                record.step(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=len(steps),
            gradient_accumulation_steps=task.rows // task.together,
            learning_rate=task.learning_rate,
            bf16=setting.autocast,
            use_cpu=True,
            seed=task.seed,
            gradient_checkpointing=setting.recompute,
            max_length=task.work.row_tokens,
            logging_steps=1,
            **(TRAINER | {"per_device_train_batch_size": task.together}),
        )
        model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16)
        transformers.set_seed(task.seed)  # the same first A for all
        trainer = Measured(
            model,
            args=arguments,
            train_dataset=dataset_of(steps),
            processing_class=AutoTokenizer.from_pretrained(task.model),
            peft_config=LoraConfig(lora_dropout=setting.dropout, **LORA),
            callbacks=[Steps()],
        )
        settings = {
            "trainer": f"{'philora' if setting.philora else trl.__name__}.SFTTrainer",
            "dropout": setting.dropout,
            "recomputation": setting.recompute,
            "autocast": arguments.bf16,
            **facts_of(trainer.model),
            "optimizer": f"{arguments.optim.value} lr {arguments.learning_rate} clip {arguments.max_grad_norm}",
            "rows": "packs",
            "threads": torch.get_num_threads(),
        }
        trainer.train()
    return record.result(settings, PACKAGES)


if __name__ == "__main__":
    run(train)
