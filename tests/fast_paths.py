"""Small trainings, and whether philora's fast functions took part in them; tests and their processes share them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoTokenizer, TrainerCallback
from trl.trainer.utils import add_fused_lm_head

import philora
from philora.kernels.loss import add_label_head
from philora.models.loading import local_path
from tests.conftest import make_phi3

PARTS = {
    "philora.lora.functional": "lora",
    "philora.kernels.tiled_attention": "attention",
    "philora.kernels.elementwise": "elementwise",
    "philora.kernels.loss": "loss",
}
HAND = {"lora", "attention", "elementwise"}
"""What runs where somebody calls the model; the loss at labels is the trainer's."""
TRAINER = {*HAND, "loss"}

STEPS, ROWS = 3, 4
LENGTHS = [5, 17, 2, 9, 31, 60, 40]


@contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Count the calls of philora's autograd functions in this block, by (part, "forward" or "backward")."""
    counts: Counter[tuple[str, str]] = Counter()

    def counting(function: Callable[..., Any], key: tuple[str, str]) -> Any:
        def call(*args: Any) -> Any:
            counts[key] += 1
            return function(*args)

        return staticmethod(call)

    kept = []
    for each in torch.autograd.Function.__subclasses__():
        if each.__module__ in PARTS:
            for name in ("forward", "backward"):
                kept.append((each, name, each.__dict__[name]))
                setattr(each, name, counting(getattr(each, name), (PARTS[each.__module__], name)))
    try:
        yield counts
    finally:
        for each, name, original in kept:
            setattr(each, name, original)


def used(counts: Counter[tuple[str, str]]) -> set[str]:
    """The parts that computed values and gradients."""
    return {part for part, _ in counts if counts[part, "forward"] and counts[part, "backward"]}


def backwards(counts: Counter[tuple[str, str]]) -> dict[str, int]:
    """How often each part computed gradients: recomputation does not change it, a layer that fell back does."""
    return {part: count for (part, name), count in sorted(counts.items()) if name == "backward"}


def adapted(label_head: bool = False, dropout: float = 0.0, **changes: Any) -> Any:
    """A tiny Phi-3 with an adapter whose B is not zero; with `label_head`, as the trainer prepares it."""
    base = make_phi3(**changes)
    if label_head:
        add_fused_lm_head(base)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    model = philora.get_peft_model(base, config)
    if label_head:
        add_label_head(base)
    _fill(model)
    return model.train()


def _fill(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_" in name:
                each.normal_(0.0, 0.1, generator=generator)


def rows_of(step: int) -> list[dict[str, Tensor]]:
    """The packed rows of a step, each with as many labels, so that a mean of means is the mean."""
    generator = torch.Generator().manual_seed(100 + step)
    positions = torch.cat([torch.arange(each) for each in LENGTHS])[None]
    found = []
    for _ in range(ROWS):
        ids = torch.randint(3, 97, positions.shape, generator=generator)
        labels = torch.where((positions > 0) & (positions % 4 == 3), ids, -100)
        found.append({"input_ids": ids, "position_ids": positions.clone(), "labels": labels})
    return found


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the gradients of all that trains."""
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def train(
    model: nn.Module,
    *,
    accumulation: int = ROWS,
    rank: int = 0,
    processes: int = 1,
    gradients: Callable[[nn.Module], dict[str, Tensor]] = gradients_of,
    **call: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Some steps of AdamW: this process's mean loss of each step, and the gradients of the first.

    Args:
        model: What is called; wrapped or not.
        accumulation: Forward passes of a step.
        rank: Of this process; it takes every `processes`-th row of a step, from this one on.
        processes: How many share a step.
        gradients: Reads the gradients of `model`.
        **call: Further keywords of each forward pass.
    """
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses, first = [], None
    for step in range(STEPS):
        rows = rows_of(step)[rank::processes]
        size = len(rows) // accumulation
        total = 0.0
        for at in range(0, len(rows), size):
            batch = {name: torch.cat([row[name] for row in rows[at : at + size]]) for name in rows[0]}
            loss = model(**batch, use_cache=False, **call).loss / accumulation
            loss.backward()
            total += loss.item()
        losses.append(total)
        first = gradients(model) if first is None else first
        optimizer.step()
        optimizer.zero_grad()
    assert first is not None
    return losses, first


class _FirstGradients(TrainerCallback):  # type: ignore[misc]
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.found = self.found or gradients_of(model)


def train_by_trainer(
    folder: str, accumulation: int = ROWS, config: dict[str, Any] | None = None, **settings: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """The same steps through `philora.SFTTrainer`.

    Args:
        folder: For what the trainer writes.
        accumulation: Forward passes of a step in each process.
        config: Changes of the model's configuration.
        **settings: Further arguments of `philora.SFTConfig`.
    """
    rows = [row for step in range(STEPS) for row in rows_of(step)]
    columns = {name: [row[name][0].tolist() for row in rows] for name in ("input_ids", "labels")}
    arguments = philora.SFTConfig(
        folder,
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "packing": True,
            "max_length": sum(LENGTHS),
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            **settings,
        },
    )
    first = _FirstGradients()
    trainer = philora.SFTTrainer(
        make_phi3(**(config or {})),
        args=arguments,
        train_dataset=Dataset.from_dict(columns | {"seq_lengths": [LENGTHS] * len(rows)}),
        processing_class=AutoTokenizer.from_pretrained(local_path("nano")),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[first],
    )
    _fill(trainer.model)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], first.found


def without_wrappers(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by the names in the model that was wrapped."""
    wrappers = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|^module)\.")
    return {wrappers.sub("", name): each for name, each in gradients.items()}


def gaps(
    mine: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]
) -> tuple[float, float]:
    """The largest difference of a step's loss, and the largest of a gradient relative to its norm."""
    losses, gradients = mine[0], without_wrappers(mine[1])
    their_losses, their_gradients = other[0], without_wrappers(other[1])
    assert gradients.keys() == their_gradients.keys()
    assert gradients
    loss = max(abs(a - b) for a, b in zip(losses, their_losses, strict=True))
    norms = [float((gradients[name] - each).norm() / each.norm()) for name, each in their_gradients.items()]
    return loss, max(norms)
