"""Whether two forms of one adapter are the same function: their logits on the same tokens.

Every conversion (`merge`, `export`) is checked with these before its result gets its final name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from philora.errors import AdapterError, fault

ROWS, TOKENS = 2, 64

# Relative difference of logits that one more rounding of a weight may cause: half an ulp (2^-25, 2^-12, 2^-9) grown
# over some tens of layers.
ROUNDED_ONCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Agreement(NamedTuple):
    """How far two forms are from each other, beside how far the adapter moves the base.

    Attributes:
        largest: Largest difference of a logit.
        relative: Norm of the difference over the norm of the reference.
        effect: The same of reference and base; 0 when it was not measured.
        bound: What `relative` may be.
    """

    largest: float
    relative: float
    effect: float
    bound: float

    def __str__(self) -> str:
        text = (
            f"largest difference of a logit {self.largest:.2e}, relative {self.relative:.2e} (allowed {self.bound:.0e})"
        )
        return f"{text}; the adapter moves the base by {self.effect:.2e}" if self.effect else text


def probe(vocabulary: int, device: Any = "cpu") -> Tensor:
    """Random tokens, always the same. Shape: (ROWS, TOKENS)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (ROWS, TOKENS), generator=generator).to(device)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The model's logits in evaluation mode, on the CPU in fp32. Shape: (ROWS, TOKENS, V)."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        model.train(was_training)
    return logits.float().cpu()


def agreement(
    where: str, reference: Tensor, other: Tensor, bound: float, base: Tensor | None = None, todo: str = ""
) -> Agreement:
    """Compare logits.

    Args:
        where: What the message calls the conversion.
        reference: Logits of the adapter as it was given.
        other: Logits of the converted form.
        bound: Largest relative difference that the conversion may cause.
        base: Logits of the base without the adapter.
        todo: What to do when they differ.

    Raises:
        AdapterError: They differ by more, or are not finite.
    """
    norm = reference.norm().clamp(min=1e-30)
    relative = float((other - reference).norm() / norm)
    effect = 0.0 if base is None else float((base - reference).norm() / norm)
    result = Agreement(float((other - reference).abs().max()), relative, effect, bound)
    if not relative <= bound:
        expected = f"at most {bound:g} relative to the adapter's logits"
        raise AdapterError(fault(where, "difference", relative, expected, todo or "Nothing was written"))
    return result
