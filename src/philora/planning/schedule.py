"""Compute the learning rate of every optimizer step, and check for runs that are too short to train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import get_scheduler

from philora.errors import ConfigError, fault

FEW_STEPS = 20
"""With fewer optimizer steps an adapter, which starts at zero, learns little."""


def rates(settings: Mapping[str, Any], steps: int) -> list[float] | None:
    """Return the learning rate of every optimizer step, or None if it depends on the run's losses.

    Args:
        settings: `learning_rate`, `lr_scheduler_type`, `lr_scheduler_kwargs` and `warmup_steps`, as `SFTConfig` takes
            them.
        steps: Optimizer steps of the run.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=float(settings["learning_rate"]))
    found = []
    try:
        scheduler = _scheduler(settings, steps, optimizer)
        for _ in range(steps):
            found.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
    except (TypeError, ValueError, AssertionError):
        return None  # it needs a loss, or the trainer refuses it with its own message
    return found


def _scheduler(settings: Mapping[str, Any], steps: int, optimizer: torch.optim.Optimizer) -> Any:
    warmup = float(settings.get("warmup_steps") or 0)
    return get_scheduler(
        settings.get("lr_scheduler_type") or "linear",
        optimizer,
        num_warmup_steps=int(warmup) if warmup >= 1 else math.ceil(steps * warmup),
        num_training_steps=steps,
        scheduler_specific_kwargs=dict(settings.get("lr_scheduler_kwargs") or {}),
    )


def trains_nothing(settings: Mapping[str, Any], steps: int | None) -> bool:
    """Return whether the learning rate is 0 at every step, for example if the warm-up is as long as the run.

    Args:
        settings: As for `rates`.
        steps: Optimizer steps of the run; None if unknown.
    """
    if steps is None or not 0 < steps <= FEW_STEPS:
        return False
    found = rates(settings, steps)
    return found is not None and not any(found)


def check_schedule(settings: Mapping[str, Any], steps: int | None, where: str) -> None:
    """Refuse a run whose learning rate is 0 at every step, or whose schedule cannot be made.

    Args:
        settings: As for `rates`.
        steps: Optimizer steps of the run; None if unknown.
        where: The configuration's name in the message.

    Raises:
        ConfigError: The rate is 0 at every step, so the adapter would not change; or the schedule does not accept
            `lr_scheduler_kwargs`.
    """
    given = settings.get("lr_scheduler_kwargs")
    try:
        _scheduler(settings, steps or 100, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    except (TypeError, ValueError) as error:
        expected = f"what lr_scheduler_type {settings.get('lr_scheduler_type') or 'linear'} takes: {error}"
        raise ConfigError(fault(where, "lr_scheduler_kwargs", given, expected)) from error
    if trains_nothing(settings, steps):
        expected = f"a learning rate above 0 at some step of the run, which has {steps}"
        todo = "Set warmup_steps to 0, or train for more steps: more rows, more epochs or smaller steps"
        raise ConfigError(fault(where, "warmup_steps", settings.get("warmup_steps"), expected, todo))


def few_steps(steps: int) -> str:
    """Return the warning of a run with fewer than `FEW_STEPS` optimizer steps."""
    return (
        f"the run makes {steps} optimizer steps: below about {FEW_STEPS} an adapter learns little or nothing. Give "
        f"more rows, more epochs, or smaller steps (fewer rows of a batch, less accumulation)."
    )
