"""Record the decoder stack in CUDA graphs, for rows so short that launching kernels takes longer than the kernels.

    batch -> `size_for` -> the graph of that size: its own inputs are written, forward and backward replayed
          -> copies of its outputs and gradients, which autograd accumulates as usual

A graph computes one shape. Rows are padded to a multiple of 256 tokens with one more document of zeros, and bounds with
empty documents; the longest length is a constant of the size. A row that fits no size, or that comes while the previous
pass still waits for its backward pass, runs without a graph.

The next replay overwrites the gradients of a graph, so only copies are returned. Otherwise, with accumulation, `.grad`
would be the same tensor, and the second micro-batch would overwrite the first.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from philora.kernels import graphs
from philora.kernels.layout import PackedLayout
from philora.kernels.memory import out_of_memory
from philora.lora.functional import refuse_create_graph

if TYPE_CHECKING:
    from philora.decoder_stack.layer import Keep
    from philora.decoder_stack.stack import DecoderStack, Passed

logger = logging.getLogger(__name__)

LAYOUTS = ((24, 1024), (64, 2048))
"""Number of documents, and tokens of the longest one, of a graph; attention costs as much, so small ones come first."""

EVEN_TOKENS = 256
MOST_GRAPHS = 3
MOST_FILLED_UP = 1.25
"""Once there are `MOST_GRAPHS`, a row can be computed by a graph of up to this many times its tokens."""

LARGEST_TOKENS = {"plain": 2048, "fp8": 4096, "nf4": 4096}
"""The longest row for a graph, by the base's kind: longer rows keep the device busy, and padding costs time."""

LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest difference of a graph's outputs and gradients from the stack's without a graph, relative to the norm."""


class Size(NamedTuple):
    """The shape of a packed row, or of the rows that a graph computes.

    Attributes:
        tokens: Tokens of the row.
        documents: Documents in it.
        longest_tokens: Tokens of the longest document.
    """

    tokens: int
    documents: int
    longest_tokens: int

    def holds(self, row: Size) -> bool:
        """Return whether a graph of this size can compute a row."""
        more = self.tokens - row.tokens
        return (
            more >= 0
            and row.documents + (more > 0) <= self.documents
            and max(row.longest_tokens, more) <= self.longest_tokens
        )


@dataclass(frozen=True)
class GraphFacts:
    """The facts that the choice depends on.

    Attributes:
        switch: Value of `PHILORA_GRAPHS`: "all" uses graphs in training.
        kind: Type of the device.
        base: "plain", "nf4", "fp8" or another.
        dtype: Dtype of the activations.
        keep: What is kept for backward.
        devices: Number of devices that have layers.
        autocast: Whether autocast is on.
    """

    switch: str = "all"
    kind: str = "cuda"
    base: str = "plain"
    dtype: str = "bfloat16"
    keep: str = "everything"
    devices: int = 1
    autocast: bool = False


def against(facts: GraphFacts) -> list[str]:
    """Return all reasons why the layers are computed without graphs in training; empty if there is none."""
    if facts.switch != "all":
        return ["no GPU has run this yet, PHILORA_GRAPHS=all takes it"]
    found = []
    if facts.kind != "cuda":
        found.append("a graph needs a CUDA GPU")
    if facts.base not in LARGEST_TOKENS:
        found.append(f"the base is {facts.base}")
    if facts.dtype not in ("bfloat16", "float16"):
        found.append(f"attention in {facts.dtype} reads lengths from the device")
    if facts.keep == "host":
        found.append("inputs of layers are kept in the computer's memory")
    if facts.devices > 1:
        found.append("layers are on several devices")
    if facts.autocast:
        found.append("autocast is on")
    return found


def size_for(row: Size, made: Collection[Size], most: int = MOST_GRAPHS) -> Size | None:
    """Return the size of the graph for a row, of at most `most` graphs; None if it is computed without one."""
    tokens = -(-row.tokens // EVEN_TOKENS) * EVEN_TOKENS
    sizes = [Size(tokens, documents, min(longest, tokens)) for documents, longest in LAYOUTS]
    wanted = next((size for size in sizes if size.holds(row)), None)
    if wanted is None or wanted in made or len(made) < most:
        return wanted
    return min((item for item in made if item.holds(row) and item.tokens <= MOST_FILLED_UP * row.tokens), default=None)


class Inputs(NamedTuple):
    """The stack's inputs for a batch. Shapes: x (T, C), cos and sin (T, half of the rotated columns), counter (1)."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    layout: PackedLayout
    counter: Tensor | None

    @property
    def size(self) -> Size:
        """Return the shape of the batch, without waiting for the device."""
        return Size(len(self.x), len(self.layout.bounds) - 1, self.layout.longest_tokens)


class StackGraph:
    """The stack's forward and backward pass for rows of one size, both recorded once.

    Args:
        stack, size: The stack, and the size of the rows.
        inputs: A batch that fits; on it the recorded passes are compared with the plain ones.
        keep, deterministic: As in `DecoderStack.__call__`.
        capture: Function that records.
        pool: Memory that the graphs of a stack share; only one of them is between forward and backward at a time.

    Raises:
        NotRecorded: Recording failed, or the graph's results differ from the stack's.

    Cost:
        While the graph exists: the tensors that a pass keeps for backward, its inputs, outputs and gradients.
    """

    def __init__(
        self, stack: DecoderStack, size: Size, inputs: Inputs, keep: Keep, deterministic: bool,
        capture: graphs.Capture, pool: Any,
    ) -> None:  # fmt: skip
        self.size, self.needs_x = size, inputs.x.requires_grad
        self._stack, self._keep, self._deterministic = stack, keep, deterministic
        device = inputs.x.device
        self._x, self._cos, self._sin, self._dx, self._dh = (
            torch.zeros(size.tokens, item.shape[1], dtype=item.dtype, device=device)
            for item in (inputs.x, inputs.cos, inputs.sin, inputs.x, inputs.x)
        )
        self._bounds = torch.zeros(size.documents + 1, dtype=torch.int32, device=device)
        self._counter = None if inputs.counter is None else torch.zeros_like(inputs.counter)
        self._passed: Passed | None = None
        self._load(inputs)
        self._load_gradients(inputs.x.detach(), inputs.x.detach())
        expected = [*self._forward(), *self._backward()]
        self._passes = graphs.recorded([self._forward, self._backward], device, capture, pool)
        self._passed = None
        for step in self._passes:
            step.replay()
        gap = _gap([result for one in self._passes for result in one.results], expected)
        largest = LARGEST_DIFFERENCE[inputs.x.dtype]
        if not gap < largest:
            raise graphs.NotRecorded(f"its results differ by {gap:.2g} from those without one, at most {largest:g}")

    def _forward(self) -> tuple[Tensor, Tensor]:
        layout = PackedLayout(self._bounds, self.size.longest_tokens)
        self._passed = self._stack.forward(
            self._x, self._cos, self._sin, layout,
            keep=self._keep, counter=self._counter, deterministic=self._deterministic,
        )  # fmt: skip
        return self._passed.x, self._passed.h

    def _backward(self) -> tuple[Tensor | None, ...]:
        assert self._passed is not None
        dx, trained = self._stack.backward(self._passed, self._dx, self._dh, self.needs_x)
        return dx, *trained

    def _load(self, inputs: Inputs) -> None:
        for own, given in ((self._x, inputs.x), (self._cos, inputs.cos), (self._sin, inputs.sin)):
            _fill(own, given.detach())
        self._bounds.fill_(self.size.tokens)
        self._bounds[: len(inputs.layout.bounds)] = inputs.layout.bounds
        if self._counter is not None and inputs.counter is not None:
            self._counter.copy_(inputs.counter)

    def _load_gradients(self, dx: Tensor, dh: Tensor) -> None:
        _fill(self._dx, dx)
        _fill(self._dh, dh)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return the stack's results as new tensors. Shapes: (T, C) twice."""
        self._load(inputs)
        self._passes[0].replay()
        x, h = own_copies(self._passes[0].results)
        assert x is not None
        assert h is not None
        return x[: len(inputs.x)], h[: len(inputs.x)]

    def backward(self, dx: Tensor, dh: Tensor) -> list[Tensor | None]:
        """Return the gradients of x and of `DecoderStack.trained` as new tensors. Shapes: dx and dh (T, C)."""
        self._load_gradients(dx, dh)
        self._passes[1].replay()
        of_x, *trained = own_copies(self._passes[1].results)
        return [None if of_x is None else of_x[: len(dx)], *trained]


def _fill(own: Tensor, given: Tensor) -> None:
    """Write rows, and zeros after them."""
    own[: len(given)] = given
    own[len(given) :] = 0


def own_copies(tensors: Collection[Tensor | None]) -> list[Tensor | None]:
    """Return copies of a graph's results, made by one call, which the next replay does not overwrite."""
    copies = [None if tensor is None else torch.empty_like(tensor) for tensor in tensors]
    there = [(new, old) for new, old in zip(copies, tensors, strict=True) if new is not None and old is not None]
    torch._foreach_copy_([new for new, _ in there], [old for _, old in there])
    return copies


def _gap(found: list[Tensor | None], expected: list[Tensor | None]) -> float:
    """Return the largest difference of a result relative to its norm."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    gaps = [(a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30) for a, b in pairs]
    return float(torch.stack(gaps).max())


class _Turn:
    """A pass of a graph between forward and backward."""

    done = False


class _ByGraph(torch.autograd.Function):
    """The stack as a graph in autograd, with the embeddings and the trained parameters as inputs."""

    @staticmethod
    def forward(ctx: Any, graph: StackGraph, turn: _Turn, inputs: Inputs, x: Tensor, *trained: Tensor) -> Any:
        """Return the graph's results. x is `inputs.x`, trained as `DecoderStack.trained`; autograd tracks both."""
        ctx.graph, ctx.turn = graph, turn
        return graph.forward(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the trained parameters."""
        refuse_create_graph()
        if ctx.turn.done:
            raise RuntimeError("the decoder stack's CUDA graph computes one backward pass for each forward pass")
        ctx.turn.done = True
        return None, None, None, *ctx.graph.backward(*grads)


class GraphRunner:
    """The graphs of a stack.

    Args:
        stack, device: The stack and its device.
        base: The kind of its base, a key of `LARGEST_TOKENS`.
        capture: Function that records; default: `graphs.record` on a GPU, else `graphs.repeat`.
    """

    def __init__(
        self, stack: DecoderStack, device: torch.device, base: str, capture: graphs.Capture | None = None
    ) -> None:
        self.stack = stack
        self.made: dict[tuple[Hashable, Size], StackGraph] = {}
        self._largest = LARGEST_TOKENS[base]
        self._capture = capture or graphs.capture_for(device)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._memory: tuple[int, ...] = ()
        self._turn: Any = None
        self._warned: set[str] = set()

    def __call__(self, inputs: Inputs, keep: Keep, deterministic: bool) -> tuple[Tensor, Tensor] | None:
        """Return the stack's results by a graph, or None if the batch has to be computed without one."""
        waiting = None if self._turn is None else self._turn()
        if (waiting is not None and not waiting.done) or inputs.size.tokens > self._largest or "failed" in self._warned:
            return None
        trained = self.stack.trained
        kind = (keep, deterministic, inputs.x.requires_grad, tuple(self.stack.chances()), inputs.counter is None)
        now = (*self.stack.addresses(), *(item is not None and item.requires_grad for item in trained))
        if now != self._memory:
            self.made.clear()  # a graph uses the addresses that the weights had when it was recorded
            self._memory = now
        sizes = [item.size for (own, _), item in self.made.items() if own == kind]
        size = size_for(inputs.size, sizes, MOST_GRAPHS - len(self.made) + len(sizes))
        if size is None:
            tokens, documents, longest = inputs.size
            self._warn("size", f"{tokens} tokens in {documents} documents of up to {longest} fit none of its sizes")
            return None
        graph = self.made.get((kind, size)) or self._new(kind, size, inputs, keep, deterministic)
        if graph is None:
            return None
        turn = _Turn()
        self._turn = weakref.ref(turn)
        found: tuple[Tensor, Tensor] = _ByGraph.apply(graph, turn, inputs, inputs.x, *trained)  # type: ignore[no-untyped-call]
        return found

    def _new(self, kind: Hashable, size: Size, inputs: Inputs, keep: Keep, deterministic: bool) -> StackGraph | None:
        made: StackGraph | None
        try:
            made = StackGraph(self.stack, size, inputs, keep, deterministic, self._capture, self._pool)
        except Exception as error:
            if not isinstance(error, graphs.NotRecorded) and not out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            made = None
        if made is None:  # outside of `except`, so that the memory of the recording is freed
            self.made.clear()
            self._warn("failed", reason)
            return None
        self.made[kind, size] = made
        return made

    def _warn(self, what: str, reason: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            logger.warning("decoder layers run without a CUDA graph: %s", reason)
