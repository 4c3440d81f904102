"""Measure how fast this machine multiplies, for a moment before a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from philora.kernels.quantization import QuantizedWeight, empty_layer
from philora.planning.footprint import Footprint


class Rate(NamedTuple):
    """The measured speed of this machine.

    Attributes:
        flops_per_second: Rate of products with the shape of the model's largest linear layer.
        dequantized_per_second: Dequantised weights per second; None without a quantised base.
        seconds: Time that the measurement took.
    """

    flops_per_second: float
    dequantized_per_second: float | None
    seconds: float


_SLOW_SECONDS = 0.25


def measure_rate(counted: Footprint, tokens: int) -> Rate:
    """Measure the rate of products of the model's largest linear layer, with the run's threads.

    Rows are added, beginning with one, until a product takes 20 ms or has the micro-batch's rows, forward and backward.
    This takes about a second even on a processor without instructions for the dtype, which is a hundred times slower.

    Args:
        counted: Sizes of the model.
        tokens: Tokens of a micro-batch.
    """
    begun = time.perf_counter()
    device, dtype = counted.device, counted.dtype
    shape = counted.linears.out_features, counted.linears.in_features

    def wait() -> None:
        if device != "cpu":
            torch.accelerator.synchronize()

    def seconds_of(work: Callable[[], object]) -> float:
        wait()
        at = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - at

    weight = torch.full(shape, 0.01, dtype=dtype, device=device)
    if device != "cpu":  # with different numbers a GPU draws more power and is slower
        weight.normal_(generator=torch.Generator(device).manual_seed(0))
    rows = 1
    with torch.no_grad():
        while True:
            x, dy = (torch.full((rows, size), 0.01, dtype=dtype, device=device) for size in reversed(shape))

            def both(x: torch.Tensor = x, dy: torch.Tensor = dy) -> None:
                torch.mm(x, weight.t())
                torch.mm(dy, weight)

            seconds = seconds_of(both)  # the first call makes the kernels
            if seconds < _SLOW_SECONDS:
                seconds = seconds_of(both)
            if seconds >= 0.04 or rows >= tokens:
                break
            rows = min(4 * rows, tokens)
        if seconds < _SLOW_SECONDS:
            seconds = statistics.median([seconds, *(seconds_of(both) for _ in range(2))])
    dequantized = _dequantized_per_second(counted, seconds_of) if counted.quantized_matrix else None
    return Rate(4 * rows * shape[0] * shape[1] / seconds, dequantized, time.perf_counter() - begun)


def _dequantized_per_second(counted: Footprint, seconds_of: Callable[[Callable[[], object]], float]) -> float:
    """Measure the number of weights dequantised per second, on a layer of 1024 x 4096."""
    layer = empty_layer(counted.quantization, 4096, 1024, counted.dtype).to(counted.device)
    weight = QuantizedWeight(layer)

    @torch.no_grad()
    def work() -> object:
        return weight.dequantize(counted.dtype)

    seconds_of(work)
    return 4096 * 1024 / statistics.median(seconds_of(work) for _ in range(3))
