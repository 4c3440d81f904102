"""Record work in a CUDA graph once and launch it by one call, over the same memory.

A replay reads the tensors that the recorded function read, and writes the tensors that it returned. `recorded` calls
`record` or, for tests on any device, `repeat`, and restores the random generators after a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from philora.lora.recomputation import random_state, set_random_state

Work = Callable[[], tuple[Tensor | None, ...]]

WARM_UPS = 2
"""Runs before a recording, in which kernels are compiled and libraries allocate workspaces."""


class Recorded(NamedTuple):
    """Work that can be launched again.

    Attributes:
        replay: Function that launches the work.
        results: Tensors that it writes.
    """

    replay: Callable[[], None]
    results: tuple[Tensor | None, ...]


class NotRecorded(Exception):
    """Work could not be recorded, for the reason in the message. The caller computes without a graph."""


Capture = Callable[[Work, torch.device, Any], Recorded]


def record(work: Work, device: torch.device, pool: Any = None) -> Recorded:
    """Record the kernels that a function launches on a CUDA device, on which it does not wait.

    The function runs once, and its kernels do not compute while they are recorded. Graphs with the same pool
    (`torch.cuda.graph_pool_handle`) share free memory.
    """
    graph = torch.cuda.CUDAGraph()
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    # Another thread (of a data loader, of NCCL) may call CUDA at the same time. By default that ends the recording.
    recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")
    with torch.cuda.device(device), recording:
        results = work()
    return Recorded(graph.replay, results)


def repeat(work: Work, device: torch.device, pool: Any = None) -> Recorded:
    """Return work that calls the function again, as a stand-in for `record` on any device."""
    results = work()

    def replay() -> None:
        for old, new in zip(results, work(), strict=True):
            if old is not None and new is not None:
                old.copy_(new)

    return Recorded(replay, results)


def capture_for(device: torch.device) -> Capture:
    """Return the function that records on this device."""
    return record if device.type == "cuda" else repeat


def _warm_up(works: list[Work], device: torch.device) -> None:
    """Run functions before they are recorded, on a CUDA device in another stream than the current one."""
    if device.type != "cuda":
        return
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            for work in works:
                work()
    torch.cuda.current_stream(device).wait_stream(stream)


def recorded(works: list[Work], device: torch.device, capture: Capture, pool: Any = None) -> list[Recorded]:
    """Record functions one after another.

    Raises:
        NotRecorded: One of them cannot be recorded, or there is not enough memory. The random generators of the CPU
            and of the device, which a failed recording may have advanced, are restored.
    """
    states = {item: random_state(item) for item in {torch.device("cpu"), device}}
    try:
        _warm_up(works, device)
        return [capture(work, device, pool) for work in works]
    except Exception as error:  # noqa: BLE001 - Triton's errors have no narrower class
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    for item, state in states.items():
        set_random_state(item, state)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise NotRecorded(reason)
