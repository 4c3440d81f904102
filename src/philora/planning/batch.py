"""Choose the batch of a run: the largest micro-batch that fits, with the least recomputation."""

from __future__ import annotations

import math
from typing import NamedTuple

from philora.planning.footprint import NOT_EVALUATED, WHOLE_LAYERS, Estimate, Evaluated, Footprint, Recomputation

# The most tokens of an optimizer step under `tokens_per_step: auto`, on a CPU and on an accelerator.
TOKENS_PER_STEP = 8192
TOKENS_PER_STEP_ACCELERATOR = 16384
STEPS_PER_EPOCH = 100  # the goal of `tokens_per_step: auto` for small data
# Share of the memory that a plan uses; the rest is a margin.
FILLED = 0.9
# With fewer rows than this, the time of a product is that of reading its weight. More recomputation is better then.
TOKENS_AT_LEAST = 512
# A GPU is busy with this many tokens of a micro-batch (docs/performance.md). With fewer than the second number,
# launches cost more than recomputing complete layers.
TOKENS_AT_LEAST_ACCELERATOR, TOKENS_BEFORE_WHOLE_LAYERS = 8192, 4096
GRADES: tuple[Recomputation, ...] = ("none", "elementwise", "full", "host")


class Batch(NamedTuple):
    """Rows of a micro-batch, micro-batches of a step, recomputation, and the estimated memory."""

    rows: int
    accumulation: int
    recomputation: Recomputation
    estimate: Estimate


def choose(
    counted: Footprint,
    *,
    row_tokens: int,
    tokens_per_step: int | None,
    rows: int | None,
    accumulation: int | None,
    recomputation: Recomputation | None,
    memory: int,
    processes: int = 1,
    label_share: float = 1.0,
    evaluation: Evaluated = NOT_EVALUATED,
    longest_row_tokens: int | None = None,
    host: bool = False,
) -> Batch:
    """Choose the settings of the batch that are not given: the largest micro-batch, with the least recomputation.

    On an accelerator micro-batches of at least `TOKENS_AT_LEAST_ACCELERATOR` tokens are preferred, within the step.

    Args:
        counted: Sizes of the model.
        row_tokens: Tokens of one row (a pack, or a mean example).
        tokens_per_step: Tokens of one optimizer step; default `TOKENS_PER_STEP`.
        rows: Rows of a micro-batch if given.
        accumulation: Micro-batches of a step if given.
        recomputation: What backward computes again, if given. Complete layers are recomputed from inputs on the device
            or, if those do not fit, in host memory.
        memory: Available bytes; a tenth is left free.
        processes: Processes that share a step. The step's rows are rounded up to a multiple of it.
        label_share: Share of the tokens that have a label.
        evaluation: Sizes of the evaluation's batches.
        longest_row_tokens: Tokens of the longest row, which must fit into memory; default: `row_tokens`.
        host: Whether inputs of layers can be kept in host memory.
    """
    longest = longest_row_tokens or row_tokens
    in_a_step = max(1, round((tokens_per_step or TOKENS_PER_STEP) / row_tokens))
    wanted = max(1, round(math.ceil(in_a_step / processes) / (accumulation or 1)))
    wanted_grades = {None: GRADES, "full": WHOLE_LAYERS}.get(recomputation, (recomputation,))
    grades = [entry for entry in GRADES if entry in wanted_grades and (host or entry != "host")]
    sizes = [rows] if rows is not None else [n for n in range(wanted, 0, -1) if wanted % n == 0 or n == 1]
    options = [(micro, grade) for grade in grades for micro in sizes]
    options.sort(key=lambda option: _rank(option[0] * row_tokens, option[1], sizes[0] * row_tokens, counted.device))
    found = [
        (micro, grade, counted.estimate(micro * longest, grade, label_share=label_share, evaluation=evaluation))
        for micro, grade in options
    ]
    # Evaluation and loading do not depend on the batch.
    least = min(found, key=lambda option: option[2].training)
    micro, grade, estimate = next((entry for entry in found if entry[2].training <= FILLED * memory), least)
    return Batch(micro, accumulation or max(1, round(wanted / micro) if rows is None else 1), grade, estimate)


def _rank(tokens: int, recomputation: Recomputation, most: int, device: str) -> int:
    """Return the rank at which a micro-batch is tried, 0 first; equal ranks are tried in the order of `GRADES`.

    `tokens` are the micro-batch's, `most` those of the largest one.
    """
    if device == "cpu":
        return int(tokens < min(TOKENS_AT_LEAST, most))
    whole = 2 * (recomputation in WHOLE_LAYERS)
    if tokens >= min(TOKENS_AT_LEAST_ACCELERATOR, most):
        return whole
    return 1 + whole if tokens >= min(TOKENS_BEFORE_WHOLE_LAYERS, most) else 4


def step_tokens(epoch_tokens: int, conversation_tokens: int = 1, device: str = "cpu") -> int:
    """Return the tokens of an optimizer step under `tokens_per_step: auto`.

    It is a hundredth of one epoch, so that three epochs of small data make about 300 steps. It is at least one
    conversation, and at most the tokens that keep an accelerator or a CPU busy.

    Args:
        epoch_tokens: Tokens of the training data.
        conversation_tokens: Tokens of a mean conversation.
        device: The run's device, `cpu` or the accelerator's name.
    """
    most = TOKENS_PER_STEP if device == "cpu" else TOKENS_PER_STEP_ACCELERATOR
    return min(most, max(1, conversation_tokens, round(epoch_tokens / STEPS_PER_EPOCH)))


def recomputation_of(gradient_checkpointing: bool | str) -> Recomputation | None:
    """Return the recomputation that `training_config.gradient_checkpointing` means; None for auto."""
    named: dict[bool | str, Recomputation] = {
        False: "none", "elementwise": "elementwise", True: "full", "host": "host",
    }  # fmt: skip
    return named.get(gradient_checkpointing)


def gradient_checkpointing_of(recomputation: Recomputation) -> bool | str:
    """Return the value of `SFTConfig(gradient_checkpointing=...)` for a recomputation."""
    return recomputation if recomputation in ("elementwise", "host") else recomputation == "full"
