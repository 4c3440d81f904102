"""Represent an adapter independently of its format, and arrange it in the layouts of PEFT's format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from philora.adapters.slices import Slices, ranked_by_zeros, slices_named
from philora.adapters.targets import Names
from philora.errors import AdapterError, fault, one_per_line

# The update of a module can change by one rounding of B (scale folded in) and one of the product.
UPDATE_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}


@dataclass(frozen=True)
class Update:
    """The update of one module: `scaling * B A`, transposed for an embedding.

    Shapes:
        lora_A (R, in), lora_B (out, R); with slices B is zero outside their blocks.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    slices: Slices = ()
    embedding: bool = False

    @property
    def rank(self) -> int:
        """Return R, of all slices together."""
        return self.lora_A.shape[0]

    def delta(self) -> Tensor:
        """Return `scaling * B A` in fp32 or more. Shape: (out, in)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return (self.lora_B.to(dtype) @ self.lora_A.to(dtype)) * self.scaling


@dataclass(frozen=True)
class Adapter:
    """An adapter independent of its format: updates, complete trained tensors, and PEFT's configuration."""

    updates: dict[str, Update]
    whole: dict[str, Tensor] = field(default_factory=dict)
    config: LoraConfig = field(default_factory=lambda: LoraConfig(task_type="CAUSAL_LM"))


def plain_number(value: float) -> float:
    """Return a value that is nearly an integer as an int, as PEFT writes alpha; else the value."""
    near = round(value)
    return near if math.isclose(value, near, rel_tol=1e-12) else value


def as_fused(adapter: Adapter, model: PreTrainedModel) -> Adapter:
    """Return the same matrices as updates of the fused modules; further training can fill the zeros between blocks."""
    return replace(adapter, updates={name: replace(update, slices=()) for name, update in adapter.updates.items()})


def as_slices(adapter: Adapter, model: PreTrainedModel) -> Adapter:
    """Return the updates of fused modules as updates of their slices.

    An update whose B is block-diagonal is split into its blocks. For any other, every slice gets all of A and its rows
    of B: this is exact, but multiplies the rank by the number of slices.

    Raises:
        AdapterError: Slices of one module would differ in rank.
    """
    rows = Names.of(model).rows
    updates = {}
    for name, update in adapter.updates.items():
        if name in rows and not update.slices:
            update = _sliced(update, rows[name])
        updates[name] = update
    return replace(adapter, updates=updates)


def _sliced(update: Update, rows: Mapping[str, tuple[int, int]]) -> Update:
    found = ranked_by_zeros(update.lora_B, rows)
    if found is not None:
        r, chosen = found
        return replace(update, slices=slices_named(chosen, rows, r))
    parts = slices_named(list(rows), rows, update.rank)
    up = update.lora_B.new_zeros(update.lora_B.shape[0], parts[-1].rank_stop)
    for part in parts:
        span = slice(part.row_start, part.row_stop)
        up[span, part.rank_start : part.rank_stop] = update.lora_B[span]
    return replace(update, lora_A=update.lora_A.repeat(len(parts), 1), lora_B=up, slices=parts)


def for_server(adapter: Adapter, model: PreTrainedModel) -> Adapter:
    """Return updates with one rank and one alpha for all modules: llama.cpp has one alpha, and vLLM no patterns.

    Numerics:
        B times its scaling is rounded once to B's dtype (exact when the scaling is a power of two).

    Raises:
        AdapterError: The adapter has more than updates of linear layers.
    """
    todo = "Merge it instead (philora merge), or export --layout fused"
    faults = [
        fault("export", "layout server", name, "updates of linear layers only", todo)
        for name in [*adapter.whole, *(name for name, update in adapter.updates.items() if update.embedding)]
    ]
    if faults:
        raise AdapterError(one_per_line(faults))
    rank = max(update.rank for update in adapter.updates.values())
    updates = {}
    for name, update in adapter.updates.items():
        missing = rank - update.rank
        up = (update.lora_B.double() * update.scaling).to(update.lora_B.dtype)
        updates[name] = Update(
            nn.functional.pad(update.lora_A, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing)), 1.0
        )
    return replace(adapter, updates=updates)


def check_updates(adapter: Adapter, again: Adapter) -> None:
    """Check that the update of every module is the same, also if it hardly affects the logits of a few tokens.

    Raises:
        AdapterError: An update is missing, or differs by more than a rounding.
    """
    faults = []
    for name, update in adapter.updates.items():
        other = again.updates.get(name)
        if other is None:
            faults.append(fault("export", name, "missing", "every update in the result"))
            continue
        want, got = update.delta(), other.delta()
        difference = float((got - want).norm() / want.norm().clamp(min=1e-30))
        bound = UPDATE_TOLERANCE[update.lora_B.dtype]
        if not difference <= bound:
            faults.append(fault("export", name, difference, f"an update that differs by at most {bound:g}"))
    for name, value in adapter.whole.items():
        if name not in again.whole or not torch.equal(value.float(), again.whole[name].float()):
            faults.append(fault("export", name, "changed", "every complete tensor in the result"))
    if faults:
        raise AdapterError(one_per_line(faults))
