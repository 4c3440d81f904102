"""Check for the packages and hardware that a run needs, before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from philora.configuration.sections import Config
from philora.errors import fault, nearest

_ATTENTION = "model.attn_implementation"
_FLASH = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}


def faults(config: Config) -> list[str]:
    """Return faults for trackers whose package is missing, and for an attention that the device does not support."""
    return [*_trackers(config), *_attention(config)]


def _trackers(config: Config) -> Sequence[str]:
    """Return a fault for every tracker of `report_to` that is unknown or not installed."""
    given = config.training_config.get("report_to")
    names = [given] if isinstance(given, str) else list(given or ())
    found = []
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            expected = "one of " + ", ".join(sorted(INTEGRATION_TO_CALLBACK)) + ", all or none"
            todo = nearest(name, list(INTEGRATION_TO_CALLBACK))
        elif name not in get_available_reporting_integrations():
            expected = "a tracker whose package is installed"
            todo = f"Install it (pip install {name.replace('_', '-')}), or leave it out"
        else:
            continue
        found.append(fault(config.source, "training_config.report_to", name, expected, todo))
    return found


def _attention(config: Config) -> Sequence[str]:
    """Return a fault if the device cannot train with the attention implementation."""
    cpu = bool(config.training_config.get("use_cpu")) or not torch.accelerator.is_available()
    given = config.model.attn_implementation
    expected = None
    if given == "flex_attention" and cpu:
        expected = "an implementation that trains on a CPU: PyTorch's flex_attention has no backward pass there"
    elif given in _FLASH and cpu:
        expected = "an implementation that trains on a CPU: the flash kernels need a GPU"
    elif given in _FLASH and not _FLASH[given]():
        expected = f"an implementation whose package is installed: {given} needs flash-attn for this GPU and PyTorch"
    return [] if expected is None else [fault(config.source, _ATTENTION, given, expected, "Set auto, or sdpa")]
