"""Check that two forms of an adapter compute the same, by their logits on the same tokens.

Every conversion (`merge`, `export`) is checked before its result gets its final name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from philora.errors import AdapterError, fault

ROWS, TOKENS = 2, 64

# Relative difference of logits that one more rounding of a weight can cause: half an ulp (2^-25, 2^-12, 2^-9) that
# grows over some tens of layers.
ROUNDED_ONCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Agreement(NamedTuple):
    """The difference of two forms, and the adapter's effect on the base for comparison.

    Attributes:
        largest: Largest difference of a logit.
        relative: Norm of the difference divided by the norm of the reference.
        effect: The same between reference and base; 0 if it was not measured.
        bound: The allowed value of `relative`.
    """

    largest: float
    relative: float
    effect: float
    bound: float

    def __str__(self) -> str:
        relative = f"relative {self.relative:.2e} (allowed {self.bound:.0e})"
        text = f"largest difference of a logit {self.largest:.2e}, {relative}"
        return f"{text}; the adapter moves the base by {self.effect:.2e}" if self.effect else text


def probe(vocabulary: int, device: Any = "cpu") -> Tensor:
    """Return random tokens, always the same. Shape: (ROWS, TOKENS)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (ROWS, TOKENS), generator=generator).to(device)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the model's logits in evaluation mode, on the CPU in fp32. Shape: (ROWS, TOKENS, V)."""
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
    """Compare logits of the given adapter with those of the converted form, and with those of the base alone.

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


# Mean divergence that a file's type is allowed to cause, in nats. On the bundled model f16 gave 1e-9 when read back in
# fp32 and 1e-6 in llama.cpp, and a reference in bf16 gave 1e-4; q8_0, with 8 bits per weight, gave 1e-3. The limits are
# ten to twenty times larger, for other models.
DIVERGENCE = {"f32": 1e-3, "f16": 1e-3, "q8_0": 2e-2}


class Divergence(NamedTuple):
    """The divergence between the next-token distributions of two forms of a model.

    Attributes:
        reader: The program that computed the second form.
        mean: Kullback-Leibler divergence from the trained model, in nats, mean over the positions.
        largest: The largest divergence at a position.
        same: Share of the positions where both have the same most likely token.
        positions: Number of positions.
        effect: Mean divergence of the base from the trained model.
        bound: The allowed value of `mean`.
    """

    reader: str
    mean: float
    largest: float
    same: float
    positions: int
    effect: float
    bound: float

    def __str__(self) -> str:
        return (
            f"{self.reader}: KL divergence {self.mean:.1e} nats (allowed {self.bound:.0e}, "
            f"largest {self.largest:.1e}), same next token at {self.same:.1%} of {self.positions} positions; "
            f"the adapter moves the base by {self.effect:.1e} nats"
        )


def row_logits(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the model's logits for every row of token ids, on the CPU in fp32. Shapes: (T, V)."""
    device = next(model.parameters()).device
    return [logits_of(model, torch.tensor([list(row)], device=device))[0] for row in rows]


def divergence(
    where: str, reader: str, reference: Sequence[Tensor], other: Sequence[Tensor], base: Sequence[Tensor], bound: float
) -> Divergence:
    """Compare the trained model's distributions over the next token with those of the written form and of the base.

    Shapes:
        The elements of the three lists are (T, V), with T tokens of the row.

    Raises:
        AdapterError: The mean is larger, or a value is not finite.
    """
    divergences = torch.cat([_kl(a, b) for a, b in zip(reference, other, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(reference, other, strict=True)])
    effect = torch.cat([_kl(a, b) for a, b in zip(reference, base, strict=True)])
    mean, largest, alike = float(divergences.mean()), float(divergences.max()), float(same.float().mean())
    result = Divergence(reader, mean, largest, alike, len(divergences), float(effect.mean()), bound)
    if not result.mean <= bound:
        expected = f"a mean divergence from the trained model of at most {bound:g} nats"
        raise AdapterError(fault(where, reader, result.mean, expected, "Nothing was written"))
    return result


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    """Return the divergence at every position. Shape: (T,)."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
