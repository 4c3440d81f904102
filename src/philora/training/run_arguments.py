"""Make TRL's arguments for a run: with every `auto` decided and all files in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel

from philora.compat.transformers import use_one_gpu
from philora.configuration.sections import Config
from philora.planning import outlook
from philora.planning.batch import gradient_checkpointing_of
from philora.training import readiness
from philora.training.arguments import CHOSEN, SFTConfig
from philora.training.run_context import RunContext

CURVE_POINTS = 100
"""Points of a curve in the report, if a run has as many steps."""


def resolve_arguments(run: RunContext, model: PeftModel, chosen: Mapping[str, Any]) -> SFTConfig:
    """Return the arguments of a run's trainer.

    Args:
        run, model: The run, and its model, whose fully trained modules become float32 where bf16 needs autocast.
        chosen: Choices of a resumed run, by the names in `CHOSEN`; missing ones are made now.
    """
    base, plan = model.get_base_model(), run.plan
    decided: dict[str, Any] = {key: chosen[key] for key in CHOSEN if key in chosen}
    given = run.config.training_config | decided
    if (eval_rows := given.get("per_device_eval_batch_size", "auto")) == "auto":
        eval_rows = plan.micro_batch_rows
    if (bf16 := given.get("bf16", "auto")) == "auto":
        bf16 = _needs_autocast(model, base.dtype)
    decided |= {
        "output_dir": str(run.folder / "checkpoints"),
        "max_length": plan.max_length,
        "packing": bool(given.get("packing", True)),
        "per_device_train_batch_size": plan.micro_batch_rows,
        "per_device_eval_batch_size": eval_rows,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_checkpointing": gradient_checkpointing_of(plan.recomputation),
        "bf16": bf16,
        "warmup_steps": outlook.warmup_steps(run.config, plan),
        "logging_steps": logging_steps(run.config, plan.steps),
    }
    if not any(hasattr(base.config, name) for name in ("num_experts", "num_local_experts")):
        # Every parameter gets a gradient in every step.
        decided["ddp_find_unused_parameters"] = given.get("ddp_find_unused_parameters", False)
    if run.prepared.eval is None:
        decided["eval_strategy"] = "no"
    arguments = readiness.arguments(run.config, **decided)
    if arguments.n_gpu > 1:  # transformers would wrap the model in nn.DataParallel, which TRL refuses
        use_one_gpu(arguments)
    return arguments


def logging_steps(config: Config, steps: int | None) -> float:
    """Return the steps between log lines: as configured, or few enough for a curve of `CURVE_POINTS`."""
    given: float = config.training_config["logging_steps"]
    if config.origins.get("training_config.logging_steps", "default") != "default" or steps is None:
        return given
    return min(given, max(1, steps // CURVE_POINTS))


def _needs_autocast(model: PeftModel, dtype: torch.dtype) -> bool:
    """Return whether a bf16 model has fully trained modules, which are kept in fp32 and need autocast.

    Without such modules weights and activations are all bf16, and autocast would only cost time.
    """
    whole = [weight for name, weight in model.named_parameters() if weight.requires_grad and "lora_" not in name]
    if dtype is torch.bfloat16:
        for parameter in whole:
            parameter.data = parameter.data.float()
    return bool(whole) and dtype is torch.bfloat16
