"""The fast functions of `philora.kernels` in plain PyTorch, which tests and benchmarks compare them with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from philora.kernels.loss import LabelScores


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in plain PyTorch. Shapes: as there."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch. Shapes: as there."""
    gate, up = gate_up.chunk(2, -1)
    return up * F.silu(gate)


def label_scores_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> LabelScores:
    """`label_scores` in plain PyTorch. Shapes: as there."""
    logits = nn.functional.linear(hidden, weight, bias).float()
    log_probabilities = logits.log_softmax(-1)
    log_probs = log_probabilities.gather(-1, labels[:, None])[:, 0]
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).detach()
    return LabelScores(log_probs, entropy, (logits.argmax(-1) == labels).float())
