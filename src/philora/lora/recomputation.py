"""Recompute cheap results in backward, instead of keeping them.

The function that computes such a result marks it (`mark`) with itself and its inputs, which are kept for backward in
any case. An autograd node that would save the result looks for the mark (`recipe_of`) and saves the inputs. Autograd
itself is not changed, so hooks on saved tensors (activation offloading) see the inputs like any other.

Random numbers are drawn again from the generator of the device of the tensors, which with a `device_map` over several
GPUs is not the current one (`random_state`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Recipe(NamedTuple):
    """How to compute a tensor again.

    Attributes:
        make: Returns the same bits for the same inputs.
        inputs: Arguments of `make`.
        version: Version of the tensor when it was marked. If it differs, the tensor was changed in place.
    """

    make: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int


def mark(result: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Mark a result as equal to `make(*inputs)`, unless gradients are off, and return it."""
    if not torch.is_grad_enabled():
        return result
    result.philora_recipe = Recipe(make, inputs, result._version)  # type: ignore[attr-defined]
    return result


def recipe_of(tensor: Tensor) -> Recipe | None:
    """Return how to compute a tensor again; None if it is not marked. A view of a marked tensor is not marked."""
    recipe: Recipe | None = getattr(tensor, "philora_recipe", None)
    return recipe if recipe is not None and recipe.version == tensor._version else None


def random_state(device: torch.device) -> Tensor:
    """Return the state of a device's random generator."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Restore a state that `random_state` returned for the same device."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
