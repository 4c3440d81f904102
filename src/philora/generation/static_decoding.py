"""Decode on a GPU: the step of `decoding.Decoder` in one CUDA graph.

A step of one new token launches hundreds of small kernels, and on a GPU the launches take longer than the kernels. Here
the shapes of a step stay the same: rows are padded to one of `ROWS`, the cache has a fixed size until it is full and
then doubles, and tokens and positions are on the device. So the step is recorded once and launched by one call, and the
tokens of 16 steps are read back together.

After every recording the logits of the graph are compared with those of the plain step in `decoding`. If they differ,
or if recording fails, the log has one warning and the steps are computed without a graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from philora.decoder_stack.choice import DeviceFacts
from philora.decoder_stack.facts import facts_of_device
from philora.generation import decoding
from philora.kernels import graphs
from philora.kernels.quantization import is_quantized
from philora.kernels.switches import graph_switch

logger = logging.getLogger(__name__)

ROWS = (1, 8, 16, 32, 64)
"""Rows that a graph is made for; more are padded to the next multiple of the last."""

STEPS = 16
"""Steps after which tokens are read back to look for stops."""

FIRST_TOKENS = 256
"""The smallest capacity of a row of the cache."""

LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of the graph's logits from the plain step's, relative to their norm, that rounding explains."""

BY_GRAPH = "a CUDA graph for each token"
"""What `answers_on` returns if a graph is used."""

Choose = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""From logits (B, V) and numbers (B) the tokens (B) and the largest logits (B)."""


@dataclass(frozen=True)
class GraphFacts:
    """Describe what the choice depends on.

    Attributes:
        device: Facts of the device and of the installation.
        dtype: Dtype of the weights.
        quantized: Whether linear layers are quantised.
        covered: Whether `decoding.Decoder` computes this model.
        switch: `PHILORA_GRAPHS`: "0" turns graphs off, "all" also takes what has not run on a GPU; else "".
    """

    device: DeviceFacts = DeviceFacts()  # noqa: RUF009 - it is frozen
    dtype: str = "bfloat16"
    quantized: bool = False
    covered: bool = True
    switch: str = ""


def against(facts: GraphFacts) -> list[str]:
    """Return every reason why answers are computed without a graph; empty if they are computed with one."""
    device = facts.device
    if device.kind != "cuda":
        return [f"a graph needs a CUDA GPU, this is {device.name}"]
    found = []
    if facts.switch == "0":
        found.append("PHILORA_GRAPHS=0 turns graphs off")
    if not device.fused:
        found.append("PHILORA_FUSED=0 turns philora's fast paths off")
    if not facts.covered:
        found.append("the model answers by transformers' generate")
    if device.triton is None:
        found.append("Triton is not installed")
    if device.capability is not None and device.capability < (8, 0):
        found.append(f"{device.name} has compute capability {'.'.join(map(str, device.capability))}, bf16 needs 8.0")
    if not found and facts.switch != "all":
        untried = [f"weights in {facts.dtype}"] if facts.dtype != "bfloat16" else []
        untried += ["quantised layers"] if facts.quantized else []
        if untried:
            found.append(f"no GPU has run this yet, PHILORA_GRAPHS=all takes it: {', '.join(untried)}")
    return found


def facts_of(model: nn.Module) -> GraphFacts:
    """Return the facts of a model and of the device that it is on."""
    weight = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    quantized = any(is_quantized(module) for module in model.modules())
    dtype = str(weight.dtype).removeprefix("torch.")
    return GraphFacts(facts_of_device(weight.device), dtype, quantized, decoding.covers(model), graph_switch())


def answers_on(device: DeviceFacts, dtype: str, quantized: bool, covered: bool) -> str:
    """Describe how answers are computed on a GPU; empty elsewhere. The arguments are as in `GraphFacts`."""
    if device.kind != "cuda":
        return ""
    reasons = against(GraphFacts(device, dtype, quantized, covered, graph_switch()))
    return f"no CUDA graph ({'; '.join(reasons)})" if reasons else BY_GRAPH


def decoder_for(
    model: nn.Module, rows: int, limit_tokens: int, packing: decoding.Packing | None = None
) -> decoding.Decoder:
    """Return the decoder for a model's answers on its device. The arguments are those of `decoding.Decoder`."""
    kind = decoding.Decoder if against(facts_of(model)) else StaticDecoder
    return kind(model, rows, limit_tokens, packing)


class TritonRows(decoding.PlainRows):
    """The element-wise work of a step by the kernels of the decoder stack, with one pass over memory each."""

    def __init__(self) -> None:
        from philora.decoder_stack import row_kernels  # needs Triton

        self._kernels = row_kernels

    def add_norm(self, norm: decoding.Norm, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute `PlainRows.add_norm`."""
        if norm.weight is None:
            return super().add_norm(norm, x, h)
        total, rows, _, _ = self._kernels.add_norm(x, h, norm.weight, norm.eps)
        return total, rows.values

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the halves that the kernel takes, in fp32. Shapes: (B, rotated columns); returns half of them."""
        half = cos.shape[-1] // 2
        return cos[:, :half].float().contiguous(), sin[:, half:].float().contiguous()

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """Compute `PlainRows.rotate` in place."""
        self._kernels.rotate_(states.view(len(states), -1), cos, sin, heads, states.shape[-1])
        return states[:, :heads]

    def gated(self, gate_up: Tensor) -> Tensor:
        """Compute `PlainRows.gated`."""
        return self._kernels.swiglu(gate_up)[0].values


class Answered(NamedTuple):
    """The results of several steps.

    Attributes:
        tokens: The token of every row after every step, on the CPU.
        tops: The largest logit that it was chosen from, on the CPU.

    Shapes:
        Both (steps, B).
    """

    tokens: Tensor
    tops: Tensor


class StaticDecoder(decoding.Decoder):
    """`decoding.Decoder` whose step is recorded once and launched again, with tokens and positions on the device.

    Args:
        model, limit_tokens, packing: As there.
        rows: Rows that are needed; the cache has `filled_up` of them.
        capture: Records a step; default: a CUDA graph on a GPU, else the step itself.
        work: Computes what is between the products; default: Triton's kernels on a GPU, else PyTorch.

    Cost:
        As there. The cache has at most twice the tokens in use, and all of it is read at every step. A recording takes
        as long as about five steps without a graph.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        limit_tokens: int,
        packing: decoding.Packing | None = None,
        *,
        capture: graphs.Capture | None = None,
        work: decoding.PlainRows | None = None,
    ) -> None:
        super().__init__(model, filled_up(rows), limit_tokens, packing)
        self.used = rows
        self._capture = capture or graphs.capture_for(self.device)
        self._work = work or (TritonRows() if self.device.type == "cuda" else decoding.PlainRows())
        self._tokens, self._at = self._inputs()
        self._recorded: graphs.Recorded | None = None
        self._off = False

    def _inputs(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.zeros(self.rows, dtype=torch.long, device=self.device) for _ in range(2))  # type: ignore[return-value]

    def capacity_for(self, tokens: int) -> int:
        """Return a power of two, or the length of the longest row rounded up for attention's loads."""
        self._recorded = None  # it reads the old cache
        return cache_tokens(tokens, len(self.cos))

    def keep(self, rows: Sequence[int], more: int = 0) -> None:
        """Keep rows as `Decoder.keep`; the memory and the graph stay if the padded number of rows does."""
        self.used = len(rows) + more
        wanted = filled_up(self.used)
        if wanted != self.rows:
            self._recorded = None
            super().keep(rows, wanted - len(rows))
            self._tokens, self._at = self._inputs()
        elif list(rows) != list(range(len(rows))):
            chosen = torch.tensor(rows, dtype=torch.long, device=self.device)
            for pair in self.cache:
                for item in pair:
                    item[: len(rows)] = item[chosen]

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Compute `Decoder.step` of the rows in use."""
        self._load(tokens, positions, 1)
        return self._next()[: self.used].clone()

    def answer(
        self, tokens: Sequence[int], positions: Sequence[int], steps: int, choose: Choose, numbers: Tensor | None
    ) -> Answered:
        """Take several steps, each with the tokens that were chosen in the step before. Shapes: numbers (steps, B).

        A row that has ended continues; its further tokens are to be ignored.

        Args:
            tokens, positions: Of every row in use, as for `step`.
            steps: How many, at least one.
            choose: Chooses the tokens on the device.
            numbers: The random numbers that they are drawn with at every step, or None.
        """
        self._load(tokens, positions, steps)
        numbers = None if numbers is None else numbers.to(self.device)
        found = torch.empty(steps, self.used, dtype=torch.long, device=self.device)
        tops = torch.empty(steps, self.used, dtype=torch.float32, device=self.device)
        for index in range(steps):
            logits = self._next()[: self.used]
            chosen, top = choose(logits, None if numbers is None else numbers[index])
            found[index], tops[index] = chosen, top
            self._tokens[: self.used] = chosen
            self._at.add_(1).clamp_(max=len(self.cos) - 1)
        return Answered(found.cpu(), tops.cpu())

    def _load(self, tokens: Sequence[int], positions: Sequence[int], steps: int) -> None:
        """Copy tokens and positions to the device, and reserve cache for so many steps."""
        self.reserve(min(len(self.cos), max(positions) + steps))
        unused = [0] * (self.rows - len(tokens))
        self._tokens.copy_(torch.tensor([*tokens, *unused]))
        self._at.copy_(torch.tensor([*positions, *unused]))

    def _next(self) -> Tensor:
        """Return the logits after the tokens at their positions, in memory that the next call overwrites."""
        if self._recorded is None and not self._off:
            self._record()
        if self._recorded is None:
            return self.compute(self._tokens, self._at, self.capacity, decoding.PlainRows())
        self._recorded.replay()
        (logits,) = self._recorded.results
        assert logits is not None
        return logits

    def _record(self) -> None:
        """Record the step, and compare it with the plain one on the current tokens."""
        expected = self.compute(self._tokens, self._at, self.capacity, decoding.PlainRows())
        if not bool(expected.isfinite().all()):
            return  # nothing to compare with; choosing a token raises the error

        def work() -> tuple[Tensor]:
            return (self.compute(self._tokens, self._at, self.capacity, self._work),)

        try:
            (made,) = graphs.recorded([work], self.device, self._capture)
        except graphs.NotRecorded as error:
            self._turn_off(f"the step could not be recorded ({error})")
            return
        made.replay()
        found = made.results[0]
        assert found is not None
        gap = float((found.float() - expected.float()).norm() / expected.float().norm())
        if not gap < LARGEST_DIFFERENCE[expected.dtype]:
            self._turn_off(f"its logits differ by {gap:.2g} from those without one")
            return
        self._recorded = made

    def _turn_off(self, reason: str) -> None:
        self._off = True
        _warn_once(reason)


@cache
def _warn_once(reason: str) -> None:
    """Warn once why answers are computed without a graph: every call of `generate` makes a decoder."""
    logger.warning("answers are computed without a CUDA graph: %s", reason)


def cache_tokens(tokens: int, longest_tokens: int) -> int:
    """Return the capacity of a row of the cache for so many tokens, if the longest row has `longest_tokens`."""
    longest = -(-longest_tokens // 64) * 64
    return min(longest, max(FIRST_TOKENS, 1 << (tokens - 1).bit_length()))


def filled_up(rows: int) -> int:
    """Return the number of rows of the graph that computes so many."""
    return next((row for row in ROWS if rows <= row), -(-rows // ROWS[-1]) * ROWS[-1])
