"""TRL, imported without wandb.

TRL's trainer imports wandb wherever it is installed, though only a run that reports to it needs it, and `import wandb`
makes two temporary folders that stay when the process is killed. So wandb looks absent while TRL is imported, and
TRL's modules import it when they use it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import accelerate.utils
import transformers
import transformers.integrations

_OWNERS = (transformers, transformers.integrations, accelerate.utils)
"""The modules from which TRL's import `is_wandb_available`."""
_really_available = transformers.integrations.is_wandb_available


def wandb_in_use() -> bool:
    """Return whether this process has imported wandb, and it can be used."""
    return "wandb" in sys.modules and bool(_really_available())


class _Wandb(ModuleType):
    """Imports wandb when one of its names is read."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("wandb"), name)


@contextmanager
def without_wandb() -> Iterator[None]:
    """Import TRL in this block without importing wandb; modules that were imported before it stay as they are."""
    kept = [(owner, owner.is_wandb_available) for owner in _OWNERS]
    for owner in _OWNERS:
        owner.is_wandb_available = wandb_in_use
    try:
        yield
    finally:
        for owner, available in kept:
            owner.is_wandb_available = available
        for name, module in list(sys.modules.items()):
            if name.startswith("trl.") and vars(module).get("is_wandb_available") is wandb_in_use:
                vars(module).setdefault("wandb", _Wandb("wandb"))


with without_wandb():
    import trl
    from trl.trainer import sft_trainer
    from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx

__all__ = ["FusedCausalLMOutput", "maybe_gather_lm_head_ctx", "sft_trainer", "trl"]
