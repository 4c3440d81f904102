"""Define data types that the kernels and products of the decoder stack share. They need PyTorch only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0  # the largest number of e4m3


class Dropout(NamedTuple):
    """Dropout on the input of one linear layer's adapter.

    Attributes:
        seed: One int64 on the device, of which 32 bits are used.
        p: Probability of dropping an element, above 0 and up to 1.
    """

    seed: Tensor
    p: float


class Rows(NamedTuple):
    """A matrix of activations or gradients, with its copy in fp8 if the next product takes one.

    Attributes:
        values: The matrix.
        quantized: `values / scales` in e4m3, or None.
        scales: One for every row in fp32, or None.

    Shapes:
        values and quantized (T, columns), scales (T, 1).
    """

    values: Tensor
    quantized: Tensor | None = None
    scales: Tensor | None = None


def kept_by_dropout(rows: int, columns: int, dropout: Dropout) -> Tensor:
    """Return which elements dropout keeps, by the same hash as the kernels, in PyTorch.

    Shapes:
        Returns (rows, columns) of bool.
    """
    largest = 0xFFFFFFFF
    key = dropout.seed.to(torch.int64) & largest
    bits = torch.arange(rows * columns, device=dropout.seed.device) & largest
    bits = ((bits ^ key) * 0x85EBCA6B) & largest
    bits = bits ^ (bits >> 15)
    bits = (((bits + key) & largest) * 0xC2B2AE35) & largest
    bits = bits ^ (bits >> 13)
    bits = (bits * 0x27D4EB2F) & largest
    bits = bits ^ (bits >> 16)
    return ((bits >> 8).float() * (1.0 / 16777216.0) >= dropout.p).view(rows, columns)
