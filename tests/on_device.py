"""The device of the test that runs: what the `device` fixture has chosen, else the CPU."""

from __future__ import annotations

from typing import Any

import torch

_chosen = [torch.device("cpu")]


def choose(device: str) -> None:
    """Let the tests that follow compute on a device."""
    _chosen[0] = torch.device(device)


def chosen() -> torch.device:
    """Return the device of the test that runs."""
    return _chosen[0]


def moved(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch with its tensors on the device of the test that runs."""
    return {name: each.to(chosen()) if isinstance(each, torch.Tensor) else each for name, each in batch.items()}
