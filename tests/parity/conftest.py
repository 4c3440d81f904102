"""What parity tests share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from philora.lora import functional


@pytest.fixture
def masks_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused function drops what nn.Dropout would drop from the same seed, so that the two can be compared."""

    def keep_mask(x: Tensor, p: float, _: bool) -> tuple[Tensor, float]:
        mask = torch.native_dropout(torch.ones_like(x), p, True)[1]
        return mask.view(torch.uint8), 0.0 if p >= 1 else 1 / (1 - p)

    monkeypatch.setattr(functional, "_keep_mask", keep_mask)
