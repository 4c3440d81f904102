"""Give private names of accelerate, and of DeepSpeed behind it, public ones."""

from __future__ import annotations

from typing import Any, cast

import torch

from philora.compat.private_names import PrivateName

PRIVATE = (
    PrivateName(
        "accelerate.optimizer.AcceleratedOptimizer._is_overflow",
        "tells the training loop that a step was skipped",
        "step_was_skipped is read-only",
    ),
    PrivateName(
        "accelerate.hooks.add_hook_to_module",
        "sets `_hf_hook` on modules whose weights are elsewhere; kernels and generation do not replace those",
        "no function returns whether a module has a hook",
    ),
)


def report_skipped(optimizer: Any, skipped: bool) -> None:
    """Tell the training loop whether the optimizer's step counts as skipped, so that the schedule waits for it."""
    optimizer._is_overflow = skipped


def zero3_weights(engine: Any) -> dict[str, torch.Tensor] | None:
    """Return the gathered trained weights under DeepSpeed's ZeRO-3 in the first process; None in the others.

    `Accelerator.get_state_dict` refuses unless `stage3_gather_16bit_weights_on_model_save` is set, and gathers the
    frozen base too.
    """
    gathered = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    return cast("dict[str, torch.Tensor] | None", gathered)
