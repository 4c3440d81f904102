"""Find hooks and patches around a module's forward, which a fast path that does not call the module would skip."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import dropout, linear
from torch.nn.modules import module as base_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks or an instance attribute `forward`."""
    own = module.__dict__
    return "forward" in own or any(own[hook] for hook in HOOKS)


def all_are_hooked() -> bool:
    """Return whether there are global hooks, which run for every module."""
    return any(getattr(base_module, name) for name in GLOBAL_HOOKS)


def is_patched() -> bool:
    """Return whether a function that PyTorch's linear layers and dropout call was replaced."""
    return not (
        is_of(nn.Linear.forward, linear.__file__)
        and is_of(nn.Dropout.forward, dropout.__file__)
        and is_of(nn.Module.__call__, base_module.__file__)
        and F.linear is _LINEAR
        and is_of(F.dropout, F.__file__)
    )


_LINEAR = torch._C._nn.linear


@cache
def is_of(function: Callable[..., Any], file: str) -> bool:
    """Return whether a function is defined in the given file of PyTorch or another library."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == file
