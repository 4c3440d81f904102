"""Find what others have put around a module's forward: a fast path that does not call the module would pass it by."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import dropout, linear
from torch.nn.modules import module as base_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    """Return whether a module has hooks of its own or a forward of its own."""
    own = module.__dict__
    return "forward" in own or any(own[hook] for hook in _HOOKS)


def all_are_hooked() -> bool:
    """Return whether hooks are set that fire for every module."""
    return bool(
        base_module._global_forward_hooks
        or base_module._global_forward_pre_hooks
        or base_module._global_backward_hooks
        or base_module._global_backward_pre_hooks
    )


def is_patched() -> bool:
    """Return whether a function that PyTorch's linear layers and dropout run was replaced."""
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
    """Return whether a function is the one that a file of PyTorch or another library defines."""
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename == file
