"""Compute what an adapter covers, and how far it moves the base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.tuners.adalora import AdaLoraLayer
from torch import nn

from philora.adapters.slices import lora_layers, low_rank_layers
from philora.kernels.quantization import parameters_in


class CoverageRow(NamedTuple):
    """Modules of one kind with the same adapter settings; `*` is the layer number."""

    module: str
    slice: str
    r: int
    scaling: float
    modules: int
    parameters: int


@dataclass(frozen=True)
class Coverage:
    """Count what an adapter covers. `print` it for a table."""

    rows: tuple[CoverageRow, ...]
    other_trainable: tuple[tuple[str, int], ...]
    frozen_linears: tuple[tuple[str, int], ...]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        head = ("module", "slice", "r", "scaling", "modules", "parameters")
        body = [(r.module, r.slice or "whole", str(r.r), f"{r.scaling:g}", str(r.modules), f"{r.parameters:,}")
                for r in self.rows]  # fmt: skip
        body += [(name, "fully trained", "-", "-", "1", f"{count:,}") for name, count in self.other_trainable]
        body += [(name, "not adapted", "-", "-", str(count), "-") for name, count in self.frozen_linears]
        widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in [head, *body]
        ]
        share = 100 * self.trainable_parameters / max(1, self.total_parameters)
        lines.append(f"trainable: {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2f}%)")
        return "\n".join(line.rstrip() for line in lines)


def coverage(model: nn.Module) -> Coverage:
    """Return which modules and slices have an adapter, of which rank, and how many parameters train."""
    rows: dict[tuple[str, str, int, float], list[int]] = {}
    layers = low_rank_layers(model)
    adapted_parameters: set[int] = set()
    for name, layer in layers.items():
        pattern = re.sub(r"\.\d+\.", ".*.", name)
        adapted_parameters.update(id(parameter) for key, parameter in layer.named_parameters() if "lora_" in key)
        for adapter in layer.active_adapters:
            extra = 0
            if isinstance(layer, AdaLoraLayer) and adapter in layer.lora_A:
                down, up, extra = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_E[adapter].numel()
            elif adapter in layer.lora_A:
                down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            elif adapter in layer.lora_embedding_A:
                down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            else:
                continue
            slices = getattr(layer.lora_B[adapter], "slice_layout", ()) if adapter in layer.lora_B else ()
            scaling = float(layer.scaling[adapter])
            if not slices:
                rows.setdefault((pattern, "", layer.r[adapter], scaling), []).append(down.numel() + up.numel() + extra)
            for entry in slices:
                r = entry.rank_stop - entry.rank_start
                count = r * (down.shape[1] + entry.row_stop - entry.row_start)
                rows.setdefault((pattern, entry.name, r, scaling), []).append(count)
    table = tuple(CoverageRow(*key, len(counts), sum(counts)) for key, counts in rows.items())
    others = tuple(
        (re.sub(r"^base_model\.model\.|\.modules_to_save\.[^.]+", "", name), parameter.numel())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapted_parameters
    )
    inside = {id(part) for layer in layers.values() for part in layer.modules()}
    frozen: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and id(module) not in inside:
            pattern = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model."))
            if "modules_to_save" in name or "original_module" in name:
                continue
            frozen[pattern] = frozen.get(pattern, 0) + 1
    trainable = sum(row.parameters for row in table) + sum(count for _, count in others)
    total = sum(parameters_in(parameter) for parameter in model.parameters())
    return Coverage(table, others, tuple(frozen.items()), trainable, total)


class UpdateNorm(NamedTuple):
    """How far an adapter moves one module.

    Attributes:
        module: The module's name in the base model.
        slice: The slice of a fused module; empty for all of it.
        norm: Frobenius norm of scaling·B·A.
        relative: `norm` divided by the norm of the base weight's rows; None over a quantised weight.
    """

    module: str
    slice: str
    norm: float
    relative: float | None


def update_norms(model: nn.Module) -> list[UpdateNorm]:
    """Return the norm of every update of the active adapters on linear layers, in the order of the modules.

    Numerics:
        fp32; ‖B A‖² is the sum of (BᵀB) ∘ (A Aᵀ), so no (out, in) matrix is made.
    """
    found = []
    for name, layer in lora_layers(model).items():
        weight = getattr(layer.get_base_layer(), "weight", None)
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A or not hasattr(layer.lora_A[adapter], "weight"):
                continue
            down, up = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
            if down.ndim != 2 or type(layer.lora_A[adapter]) is not nn.Linear:  # a convolution, or sharded by FSDP
                continue
            whole = ("", slice(None), slice(None))
            layout = [
                (entry.name, slice(entry.row_start, entry.row_stop), slice(entry.rank_start, entry.rank_stop))
                for entry in getattr(layer.lora_B[adapter], "slice_layout", ())
            ]
            for title, rows, ranks in layout or [whole]:
                a, b = down[ranks].float(), up[rows, ranks].float()
                norm = abs(float(layer.scaling[adapter])) * float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())
                size = 0.0
                if type(weight) is nn.Parameter and weight.is_floating_point() and weight.ndim == 2:
                    size = float(torch.linalg.vector_norm(weight.detach()[rows], dtype=torch.float32))
                found.append(UpdateNorm(name, title, norm, norm / size if size else None))
    return found
