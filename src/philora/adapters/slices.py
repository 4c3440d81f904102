"""Describe slices of fused projections, and keep the zeros around them at zero.

A slice adapter (`q_proj`, `v_proj`, `gate_proj`, ...) is a PEFT adapter of the fused module. The slices' A are stacked,
and their B are the diagonal blocks of a matrix that is zero elsewhere. The rank is R = r x slices, and alpha is raised
so that the multiplier stays the same. The zeros get no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from philora.lora.functional import records


class Slice(NamedTuple):
    """One slice of a fused projection: its name, its rows of the output, its columns of B (rows of A)."""

    name: str
    row_start: int
    row_stop: int
    rank_start: int
    rank_stop: int


Slices = tuple[Slice, ...]


def slices_named(names: Sequence[str], rows: Mapping[str, tuple[int, int]], r: int) -> Slices:
    """Return the slices of these names, with rank r each, in this order of ranks."""
    return tuple(Slice(name, *rows[name], index * r, (index + 1) * r) for index, name in enumerate(names))


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return PEFT's LoRA layers, without AdaLoRA's, by the name of their module in the base model."""
    return {name: layer for name, layer in low_rank_layers(model).items() if not isinstance(layer, AdaLoraLayer)}


def low_rank_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Return PEFT's LoRA and AdaLoRA layers by the name of their module in the base model.

    A and B of AdaLoRA are parameters, not modules.
    """
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    return {
        name.removeprefix(prefix): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
    }


def inside(weight: Tensor, slices: Slices) -> Tensor:
    """Return the mask of the blocks of B. Shape: that of `weight`, (out, R)."""
    mask = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
    for part in slices:
        mask[part.row_start : part.row_stop, part.rank_start : part.rank_stop] = True
    return mask


class _ZeroOutside:
    """Set the gradient of a sliced B to zero outside the slices, as a hook."""

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    def __call__(self, grad: Tensor) -> Tensor:
        return grad * self.inside.to(grad)


def keep_zeros(layer: LoraLayer, *_: Any) -> None:
    """Add the hook to every trainable sliced B that lacks it, before PEFT's own forward runs (DoRA, ...).

    A frozen B cannot have a hook, and copying or pickling a layer drops it.
    """
    if records():
        return
    for up in layer.lora_B.values():
        if not hasattr(up, "slice_layout") or not up.weight.requires_grad:
            continue
        if not any(isinstance(hook, _ZeroOutside) for hook in (up.weight._backward_hooks or {}).values()):
            up.weight.register_hook(_ZeroOutside(inside(up.weight, up.slice_layout)))


def keep_zeros_in_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the zeros outside the slices after every step of an optimizer with 8-bit states.

    bitsandbytes dequantises a zero state to a small number when its block holds larger ones, so it also moves elements
    without a gradient. Other optimizers do not.
    """
    if getattr(getattr(optimizer, "args", None), "optim_bits", None) != 8:
        return
    sliced = [
        up for layer in lora_layers(model).values() for up in layer.lora_B.values() if hasattr(up, "slice_layout")
    ]
    masks = {id(up): inside(up.weight, up.slice_layout) for up in sliced}

    @torch.no_grad()
    def restore_zeros(*_: Any) -> None:
        for up in sliced:
            up.weight.mul_(masks[id(up)].to(up.weight.device))

    if sliced:
        optimizer.register_step_post_hook(restore_zeros)


def ranked_by_zeros(weight: Tensor, rows: Mapping[str, tuple[int, int]]) -> tuple[int, list[str]] | None:
    """Return the rank and the names of the slices that B is made of; None if B is not block-diagonal."""
    for count in range(1, len(rows) + 1):
        r, rest = divmod(weight.shape[1], count)
        chosen = None if rest else _slices_by_zeros(weight, rows, r)
        if chosen is not None:
            return r, chosen
    return None


def _slices_by_zeros(weight: Tensor, rows: Mapping[str, tuple[int, int]], r: int) -> list[str] | None:
    """Return the slices that B is made of if its blocks have width r; else None."""
    chosen = []
    for block in range(weight.shape[1] // r):
        part = weight[:, block * r : (block + 1) * r]
        filled = [name for name, (start, stop) in rows.items() if bool(part[start:stop].any())]
        if len(filled) != 1:
            return None
        chosen.append(filled[0])
    return chosen if chosen == [row for row in rows if row in chosen] else None
