"""Inputs of decoder layers in the computer's memory: written in the forward pass, read back in backward.

The copies run beside the work, on a stream of their own. The way out waits for nothing; on the way back the input of
the next layer is copied while a layer's backward pass runs, into one of two buffers on the device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class HostInputs:
    """The inputs of the layers of one forward pass.

    Cost:
        Layers x T x C elements of pinned memory, which PyTorch keeps and hands out again at the next step; twice T x C
        elements of the device's. 2·T·C elements a layer pass between the two.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._kept: dict[int, Tensor] = {}
        self._buffers: dict[int, Tensor] = {}
        self._coming: dict[int, Any] = {}

    def store(self, index: int, x: Tensor) -> None:
        """Copy the input of layer `index` to the computer's memory."""
        kept = torch.empty(x.shape, dtype=x.dtype, pin_memory=self._stream is not None)
        self._after_the_work_so_far()
        with self._beside():
            kept.copy_(x, non_blocking=True)
        if self._stream is not None:
            x.record_stream(self._stream)
        self._kept[index] = kept

    def fetch(self, index: int) -> Tensor:
        """Return the input of layer `index` on the device, and begin to bring that of the layer before it.

        It stands in memory that the second call after this one writes over.
        """
        if index not in self._coming:
            self._bring(index)
        arrived = self._coming.pop(index)
        if arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(arrived)
        if index - 1 in self._kept:
            self._bring(index - 1)
        return self._buffers[index % 2]

    def _bring(self, index: int) -> None:
        kept = self._kept[index]
        if index % 2 not in self._buffers:
            self._buffers[index % 2] = torch.empty(kept.shape, dtype=kept.dtype, device=self._device)
        self._after_the_work_so_far()  # which may still read what the buffer holds
        with self._beside():
            self._buffers[index % 2].copy_(kept, non_blocking=True)
        self._coming[index] = None if self._stream is None else self._stream.record_event()

    def _after_the_work_so_far(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
