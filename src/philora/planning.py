"""What a run needs, estimated before it starts: memory by part, and the micro-batch that fits."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil
import torch

Recomputation = Literal["none", "elementwise", "full"]
"""What backward computes again: nothing, the outputs of RMSNorm and SwiGLU and dropout's masks, or whole layers."""

RUNTIME_BYTES = 600 * 2**20  # interpreter, libraries, allocator slack, measured on the CPU
TOKENS_PER_STEP = 8192  # default number of tokens in one optimizer step, where the data allows STEPS_AT_LEAST
STEPS_AT_LEAST = 100  # fewer optimizer steps than this teach an adapter little, however good the data


@dataclass(frozen=True)
class Estimate:
    """Peak memory of training by part, in bytes."""

    weights: int
    adapter: int
    activations: int
    loss: int
    runtime: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.weights + self.adapter + self.activations + self.loss + self.runtime

    def to_dict(self) -> dict[str, int]:
        """Parts and their sum."""
        return {**asdict(self), "total": self.total}


def activation_bytes_per_token(config: Any, element_bytes: int, recomputation: Recomputation) -> int:
    """Bytes of activations that one token keeps for backward in all layers.

    A decoder layer keeps, per token, about 12 vectors of the hidden size (norm inputs in and out, residuals, rotated
    q, k, v, attention output; two of them in fp32) and 5 of the intermediate size (gate, up, their activation and
    product, its copy). Element-wise recomputation leaves out the outputs of the two norms and of SwiGLU; full
    recomputation keeps one hidden vector a layer and rebuilds one layer at a time.
    """
    hidden, intermediate = int(config.hidden_size), int(getattr(config, "intermediate_size", 4 * config.hidden_size))
    layers = int(config.num_hidden_layers)
    layer = (12 * hidden + 5 * intermediate) * element_bytes + 2 * hidden * 4
    if recomputation == "elementwise":
        layer -= (2 * hidden + intermediate) * element_bytes
    return hidden * element_bytes * layers + layer if recomputation == "full" else layer * layers


def estimate(
    config: Any, parameters: int, trainable: int, tokens: int, *, element_bytes: int, recomputation: Recomputation
) -> Estimate:
    """Peak memory of a training step.

    Args:
        config: The model's configuration (hidden_size, intermediate_size, num_hidden_layers, vocab_size).
        parameters: All parameters of the base.
        trainable: Those that are trained, kept in fp32 with gradient and two AdamW moments: 16 bytes each.
        tokens: Tokens of one micro-batch.
        element_bytes: Bytes of one weight or activation.
        recomputation: What backward computes again.
    """
    chunk = min(tokens, 1024)  # TRL's head works through the labels in chunks
    return Estimate(
        weights=parameters * element_bytes,
        adapter=trainable * 16,
        activations=tokens * activation_bytes_per_token(config, element_bytes, recomputation),
        loss=chunk * int(config.vocab_size) * 4 * 3,
        runtime=RUNTIME_BYTES,
    )


def available_bytes() -> int:
    """Memory that a run can still take: of the GPU where there is one, else of this machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def step_tokens(total_tokens: float) -> int:
    """Default tokens of an optimizer step for a run over `total_tokens`, all epochs together: fewer for small data."""
    return max(1, min(TOKENS_PER_STEP, int(total_tokens / STEPS_AT_LEAST)))


@dataclass(frozen=True)
class Plan:
    """Resolved batch: rows of a micro-batch, micro-batches of a step, and what backward computes again."""

    micro_batch_rows: int
    accumulation: int
    recomputation: Recomputation
    estimate: Estimate


def choose(
    config: Any,
    parameters: int,
    trainable: int,
    *,
    row_tokens: int,
    tokens_per_step: int | None,
    rows: int | None,
    accumulation: int | None,
    recomputation: Recomputation | None,
    element_bytes: int,
    memory: int,
    processes: int = 1,
) -> Plan:
    """Fill in what the person left open: the largest micro-batch, with the least recomputation that lets one fit.

    Args:
        config: The model's configuration.
        parameters: All parameters of the base.
        trainable: Trained parameters.
        row_tokens: Tokens of one row (a pack, or a mean example).
        tokens_per_step: Tokens of one optimizer step; default `TOKENS_PER_STEP`.
        rows: Rows of a micro-batch when given.
        accumulation: Micro-batches of a step when given.
        recomputation: What backward computes again, when given.
        element_bytes: Bytes of one weight or activation.
        memory: Bytes that may be used; a tenth is left free.
        processes: Processes that share a step. Where it cannot be divided among them evenly it grows to the next
            number of rows that can.
    """
    in_a_step = max(1, round((tokens_per_step or TOKENS_PER_STEP) / row_tokens))
    wanted = max(1, round(math.ceil(in_a_step / processes) / (accumulation or 1)))

    def cost(micro: int, grade: Recomputation) -> Estimate:
        tokens = micro * row_tokens
        return estimate(config, parameters, trainable, tokens, element_bytes=element_bytes, recomputation=grade)

    grades: list[Recomputation] = ["none", "elementwise", "full"] if recomputation is None else [recomputation]
    sizes = [rows] if rows is not None else [n for n in range(wanted, 0, -1) if wanted % n == 0 or n == 1]
    options = [(micro, grade) for grade in grades for micro in sizes]
    micro, grade = next((each for each in options if cost(*each).total < 0.9 * memory), options[-1])
    return Plan(micro, accumulation or max(1, round(wanted / micro) if rows is None else 1), grade, cost(micro, grade))


def recomputation_of(gradient_checkpointing: bool | str) -> Recomputation | None:
    """The grade that `training_config.gradient_checkpointing` stands for; None where the estimate decides (auto)."""
    named: dict[bool | str, Recomputation] = {False: "none", "elementwise": "elementwise", True: "full"}
    return named.get(gradient_checkpointing)


def gradient_checkpointing_of(recomputation: Recomputation) -> bool | str:
    """The other way: what `SFTConfig(gradient_checkpointing=...)` takes for a grade."""
    return "elementwise" if recomputation == "elementwise" else recomputation == "full"
