"""Keep inputs of decoder layers in host memory: write them in the forward pass, read them back in backward.

The copies run in parallel with the computation, on a separate stream. Copies to the host wait for nothing. In backward,
the input of the next layer is copied during a layer's backward pass into one of two buffers on the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class HostInputs:
    """The inputs of the layers of one forward pass.

    Cost:
        Layers x T x C elements of pinned memory, which PyTorch reuses in the next step, and 2 x T x C elements of
        device memory. 2·T·C elements per layer are copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._kept: dict[int, Tensor] = {}
        self._buffers: dict[int, Tensor] = {}
        self._coming: dict[int, Any] = {}

    def store(self, index: int, x: Tensor) -> None:
        """Copy the input of layer `index` to host memory."""
        kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._stream is not None)
        self._wait_for_computation()
        with self._on_stream():
            kept.copy_(x, non_blocking=True)
        if self._stream is not None:
            x.record_stream(self._stream)
        self._kept[index] = kept

    def fetch(self, index: int) -> Tensor:
        """Return the input of layer `index` on the device, and start copying that of the previous layer.

        The second call after this one overwrites it.
        """
        if index not in self._coming:
            self._start_copy(index)
        arrived = self._coming.pop(index)
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        if index - 1 in self._kept:
            self._start_copy(index - 1)
        return self._buffers[index % 2]

    def _start_copy(self, index: int) -> None:
        kept = self._kept[index]
        if index % 2 not in self._buffers:
            self._buffers[index % 2] = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        self._wait_for_computation()  # which may still read the buffer
        with self._on_stream():
            self._buffers[index % 2].copy_(kept, non_blocking=True)
        self._coming[index] = None if self._stream is None else self._stream.record_event()

    def _wait_for_computation(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
