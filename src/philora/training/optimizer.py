"""Complete the optimizer of a trainer: groups of LoRA+, zeros of slices, and paging."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from philora.adapters.slices import keep_zeros_in_steps
from philora.errors import ConfigError, fault
from philora.lora.state import loraplus_fast_parameters, split_loraplus_groups

logger = logging.getLogger(__name__)


def require_fast_parameters(model: nn.Module, ratio: float | None) -> None:
    """Raise a ConfigError if LoRA+ is requested and no B trains."""
    if ratio is not None and not loraplus_fast_parameters(model):
        expected = "an adapter with a trainable B"
        raise ConfigError(fault("SFTTrainer", "loraplus_lr_ratio", ratio, expected, "Give a peft_config"))


def finish_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, wrapped: nn.Module, ratio: Any) -> None:
    """Complete an optimizer that transformers has made.

    Args:
        optimizer, model: The optimizer, and the model with its adapter.
        wrapped: The model with the trained parameters: FSDP may have made new ones.
        ratio: `loraplus_lr_ratio`; unless it is None, B gets separate groups.

    Raises:
        ConfigError: The optimizer's groups do not contain every B.
    """
    _without_pages(optimizer)
    keep_zeros_in_steps(model, optimizer)
    if ratio is not None:
        split_loraplus_groups(optimizer, loraplus_fast_parameters(wrapped), ratio)


def _without_pages(optimizer: torch.optim.Optimizer) -> None:
    """Turn off the paging of bitsandbytes' optimizer for parameters on a CPU, where it has no use."""
    on_cpu = all(weight.device.type == "cpu" for group in optimizer.param_groups for weight in group["params"])
    if getattr(optimizer, "is_paged", False) and on_cpu:
        optimizer.is_paged = False  # type: ignore[attr-defined]
        logger.warning(
            "%s: paging moves states between a GPU and host memory; on a CPU the same optimizer runs without it.",
            type(optimizer).__name__,
        )
