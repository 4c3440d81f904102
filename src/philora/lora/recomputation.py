"""Results that cost little to compute: in backward they are made again instead of being kept.

What drew random numbers draws the same again: from the generator of the device that its tensors are on, which with a
`device_map` over several GPUs is not the current one (`random_state`).

A function that makes such a result marks it (`mark`) with itself and its inputs, which are kept for backward in any
case. An autograd node that would save the result looks for the mark (`recipe_of`) and saves the inputs. Nothing of
autograd's own is changed, so hooks on saved tensors (activation offloading) see the inputs like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Recipe(NamedTuple):
    """Describe how to make a tensor again.

    Attributes:
        make: Gives the same bits from the same inputs.
        inputs: What `make` takes.
        version: Of the tensor when it was marked; another one means that it was changed in place since.
    """

    make: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int


def mark(result: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`result`, with a note on it that `make(*inputs)` is the same; none where nothing is kept for backward."""
    if not torch.is_grad_enabled():
        return result
    result.philora_recipe = Recipe(make, inputs, result._version)  # type: ignore[attr-defined]
    return result


def recipe_of(tensor: Tensor) -> Recipe | None:
    """Return how to make a tensor again, where that is cheap; None: keep it. Views are other tensors."""
    recipe: Recipe | None = getattr(tensor, "philora_recipe", None)
    return recipe if recipe is not None and recipe.version == tensor._version else None


def random_state(device: torch.device) -> Tensor:
    """The state of the generator that operations on this device draw from."""
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Put a generator back to a state that `random_state` gave for the same device."""
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)
