"""Compute a decoder layer as one autograd node, with forward and backward written by hand.

With `x` the residual stream and `h` the part not yet added to it, a layer computes

    x1 = x + h            y1 = norm(x1)     heads = attention(rotate(qkv(y1)))     h1 = o(heads)
    x2 = x1 + h1          y2 = norm(x2)     product = swiglu(gate_up(y2))          h2 = down(product)

and returns `(x2, h2)`, so that every sum is computed in the pass of the norm that follows it. This replaces some 40
autograd nodes with their launches and saved copies by one.

What is kept for backward (`Keep`):

| value          | kept                                              | computed again                        |
| -------------- | ------------------------------------------------- | ------------------------------------- |
| `everything`   | all intermediate results                          | dropout's masks                       |
| `elementwise`  | all but the outputs of the norms and of SwiGLU    | those                                 |
| `input`        | x1                                                | the layer                             |
| `host`         | x1, in pinned host memory                         | the layer                             |

Letters in the shapes: T tokens, C hidden size, H query heads, K key heads, D head size, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from philora.decoder_stack import row_kernels as kernels
from philora.decoder_stack.host_inputs import HostInputs
from philora.decoder_stack.products import Product
from philora.decoder_stack.rows import Dropout, Rows
from philora.kernels.varlen import Attention
from philora.lora.functional import refuse_create_graph, without_autocast

Keep = Literal["everything", "elementwise", "input", "host"]


class Adapter(NamedTuple):
    """The low-rank update of one linear layer.

    Attributes:
        down: A, as it trains.
        up: B, as it trains.
        working_down: A in the dtype of the products.
        working_up: scaling · B in the dtype of the products.
        scaling: Multiplier of the update.
        dropout: The module that applies dropout to A's input.
    """

    down: nn.Parameter
    up: nn.Parameter
    working_down: Tensor
    working_up: Tensor
    scaling: float
    dropout: nn.Module


@dataclass
class Pass:
    """State that the layers share in one forward pass and its backward pass.

    Attributes:
        attention: How heads attend.
        cos: Cosines of the rotary embedding.
        sin: Sines.
        keep: What is kept for backward.
        dropouts: Dropout of every linear layer of the stack, by index; None if it is off.
        host: Inputs of layers, for `keep == "host"`.
        handed_down: The gradient that a layer's backward pass has passed to the previous layer, with its fp8 copy.

    Shapes:
        cos and sin (T, half of the rotated columns), fp32.
    """

    attention: Attention
    cos: Tensor
    sin: Tensor
    dropouts: Sequence[Dropout | None]
    keep: Keep = "everything"
    host: HostInputs | None = None
    handed_down: Rows | None = None

    def on(self, device: torch.device) -> Pass:
        """Return the state for layers on a device; itself if it is on that device."""
        if self.cos.device == device:
            return self
        layout = self.attention.layout.to(device)
        dropouts = [
            None if dropout is None else dropout._replace(seed=dropout.seed.to(device)) for dropout in self.dropouts
        ]
        host = None if self.host is None else HostInputs(device)
        attention = replace(self.attention, layout=layout)
        return Pass(attention, self.cos.to(device), self.sin.to(device), dropouts, self.keep, host)

    def take_handed_down(self, grad: Tensor) -> Rows | None:
        """Return the gradient with its fp8 copy if it is the unchanged one that was handed down, else None."""
        handed, self.handed_down = self.handed_down, None
        same = handed is not None and handed.values.data_ptr() == grad.data_ptr() and handed.values._version == 0
        return handed if same else None


class AdaptedLinear:
    """A linear layer with a frozen weight, and its adapter if it has one.

    With `u` the input of A (x, or x after dropout) and s the scaling:

        y = x W^T + (u A^T) (s B)^T        g = dy (s B)
        dx = dy W + mask(g A)              dA = g^T u        dB = s dy^T (u A^T)
    """

    def __init__(self, index: int, product: Product, adapter: Adapter | None) -> None:
        self.index, self.product, self.adapter = index, product, adapter

    def forward(self, x: Rows, dropped: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return y and `u A^T`. Shapes: x and dropped (T, in); returns (T, out) and (T, r)."""
        y = self.product.forward(x)
        if self.adapter is None:
            return y, None
        down = self.down(x, dropped)
        assert down is not None
        return y.addmm_(down, self.adapter.working_up.t()), down

    def down(self, x: Rows, dropped: Tensor | None) -> Tensor | None:
        """Return `u A^T`, None without an adapter. Shapes: x and dropped (T, in); returns (T, r)."""
        if self.adapter is None:
            return None
        return (x.values if dropped is None else dropped) @ self.adapter.working_down.t()

    def backward(
        self, dy: Rows, x: Tensor, down: Tensor | None, dropout: Dropout | None, needs_x: bool = True
    ) -> Gradients:
        """Return the gradients. Shapes: dy (T, out), x (T, in) before dropout, down (T, r)."""
        dx = self.product.backward(dy) if needs_x else None
        if self.adapter is None or down is None:
            return Gradients(dx, None, None, None)
        g = dy.values @ self.adapter.working_up
        of_down = _sum_over_tokens(g, kernels.drop(x, dropout))
        of_up = _sum_over_tokens(dy.values, down).mul_(self.adapter.scaling)
        if dx is None or dropout is None:
            dx = None if dx is None else dx.addmm_(g, self.adapter.working_down)
            return Gradients(dx, None, of_down, of_up)
        return Gradients(dx, g @ self.adapter.working_down, of_down, of_up)


class Gradients(NamedTuple):
    """Gradients of one linear layer.

    Attributes:
        x: Gradient of the input, with dropout without the adapter's part; None if not needed.
        adapter: The adapter's part before dropout's mask; None if x includes it.
        down: Gradient of A.
        up: Gradient of B.
    """

    x: Any
    adapter: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def of_adapter(self) -> Gradients:
        """Return only the gradients of A and B, so that the memory of the others can be freed."""
        return self._replace(x=None, adapter=None)


def _sum_over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """Return `a^T b`, on a GPU with an fp32 result. Shapes: a (T, m), b (T, n); returns (m, n)."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t() @ b


class Kept(NamedTuple):
    """Intermediate results of one layer that backward needs; None is computed again."""

    x1: Tensor
    y1: Tensor | None
    inverse1: Tensor
    down1: Tensor | None
    qkv: Tensor
    heads: Tensor
    attention1: Tensor | None
    attention2: Tensor | None
    attention3: Tensor | None
    down2: Tensor | None
    x2: Tensor
    y2: Tensor | None
    inverse2: Tensor
    down3: Tensor | None
    gate_up: Tensor
    product: Tensor | None
    down4: Tensor | None


@dataclass
class DecoderLayer:
    """The parts of one decoder layer.

    Attributes:
        index: The layer's number in the stack.
        norms: Weights of the two norms.
        eps: Epsilon of the norms.
        linears: The fused q, k, v projection, the output projection, the fused gate and up projection, the down
            projection.
        heads: Numbers of query heads and of key heads.
        head_size: Columns of a head.
    """

    index: int
    norms: tuple[Tensor, Tensor]
    eps: float
    linears: tuple[AdaptedLinear, AdaptedLinear, AdaptedLinear, AdaptedLinear]
    heads: tuple[int, int]
    head_size: int

    def __call__(self, shared: Pass, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the residual stream before the last sum, and the part to add to it.

        Shapes:
            x and h (T, C); returns (T, C) twice.
        """
        found: tuple[Tensor, Tensor] = _Layer.apply(self, shared, x, h, *self.trained)  # type: ignore[no-untyped-call]
        return found

    def forward(self, shared: Pass, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        """Return the results of `__call__`, without autograd, and the tensors for `backward`. Shapes: as `__call__`."""
        with _on_device_of(x):
            h2, kept = self.run(shared, x, h)
            assert h2 is not None
            saved: tuple[Tensor | None, ...] = kept
            if shared.keep == "host":
                assert shared.host is not None
                shared.host.store(self.index, kept.x1)
                saved = ()
            elif shared.keep == "input":
                saved = (kept.x1,)
            elif shared.keep == "elementwise":
                saved = kept._replace(y1=None, y2=None, product=None)
        return kept.x2, h2, saved

    def backward(
        self, shared: Pass, saved: Sequence[Tensor | None], dx: Tensor, dh: Tensor, needs_x: bool, norms: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradient of x, which is also that of h, and of the trained parameters in the order of `trained`.

        `saved` is what `forward` has kept; `norms` tells whether the gradients of the two norms are needed.

        Shapes:
            dx and dh (T, C), of the residual stream and of the part to add to it; returns (T, C).
        """
        with _on_device_of(dx):
            if shared.keep in ("input", "host"):
                x1: Any = shared.host.fetch(self.index) if shared.host is not None else saved[0]
                kept = self.run(shared, x1, None, with_result=False)[1]
            else:
                kept = Kept(*saved)  # type: ignore[arg-type]
            return _gradients(self, shared, kept, dx, dh, needs_x, norms)

    @property
    def device(self) -> torch.device:
        """Return the device of the layer's weights."""
        return self.norms[0].device

    @property
    def trained(self) -> list[Tensor | None]:
        """Return the weights of the norms, then A and B of every linear layer, None without an adapter."""
        adapters = [linear.adapter for linear in self.linears]
        return [*self.norms, *(item for one in adapters for item in ((None, None) if one is None else one[:2]))]

    def split(self, qkv: Tensor) -> Sequence[Tensor]:
        """Return views of the heads. Shapes: qkv (T, (H + 2 K) D); returns (T, H, D), (T, K, D), (T, K, D)."""
        query, key = self.heads
        return torch.split(qkv.view(len(qkv), -1, self.head_size), [query, key, key], 1)

    def run(self, shared: Pass, x: Tensor, h: Tensor | None, *, with_result: bool = True) -> tuple[Tensor | None, Kept]:
        """Compute the layer; return h2 and all intermediate results. Shapes: x and h (T, C).

        Without `with_result` the last base product, which backward does not need, is left out and h2 is None.
        """
        qkv_proj, o_proj, gate_up_proj, down_proj = self.linears
        fp8 = [linear.product.takes_fp8 for linear in self.linears]
        dropouts = [shared.dropouts[linear.index] for linear in self.linears]
        x1, y1, inverse1, dropped = kernels.add_norm(x, h, self.norms[0], self.eps, dropouts[0], fp8[0])
        qkv, down1 = qkv_proj.forward(y1, dropped)
        kernels.rotate_(qkv, shared.cos, shared.sin, sum(self.heads), self.head_size)
        heads, context = shared.attention.attend(*self.split(qkv))
        flat = heads.reshape(len(heads), -1)
        rows = kernels.quantize(flat) if fp8[1] else Rows(flat)
        h1, down2 = o_proj.forward(rows, None if dropouts[1] is None else kernels.drop(flat, dropouts[1]))
        x2, y2, inverse2, dropped = kernels.add_norm(x1, h1, self.norms[1], self.eps, dropouts[2], fp8[2])
        gate_up, down3 = gate_up_proj.forward(y2, dropped)
        product, dropped = kernels.swiglu(gate_up, dropouts[3], fp8[3])
        h2, down4 = down_proj.forward(product, dropped) if with_result else (None, down_proj.down(product, dropped))
        first, second, third = context
        return h2, Kept(
            x1, y1.values, inverse1, down1, qkv, heads, first, second, third, down2,
            x2, y2.values, inverse2, down3, gate_up, product.values, down4,
        )  # fmt: skip


class _Layer(torch.autograd.Function):
    """`DecoderLayer` in autograd, with the residual stream and the trained parameters as inputs."""

    @staticmethod
    def forward(
        ctx: Any, layer: DecoderLayer, shared: Pass, x: Tensor, h: Tensor | None, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the layer; `trained` is `DecoderLayer.trained`, for autograd."""
        x2, h2, saved = layer.forward(shared, x, h)
        ctx.layer, ctx.shared = layer, shared
        ctx.save_for_backward(*saved)
        return x2, h2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, h and the trained parameters."""
        refuse_create_graph()
        needed = ctx.needs_input_grad
        needs_x = needed[2] or needed[3]
        dx, trained = ctx.layer.backward(ctx.shared, ctx.saved_tensors, *grads, needs_x, needed[4:6])
        return None, None, dx, dx if needed[3] else None, *trained


@contextmanager
def _on_device_of(x: Tensor) -> Iterator[None]:
    """Make the tensors' device current, since Triton launches kernels there, and turn autocast off."""
    with without_autocast(x.device.type), torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        yield


def _gradients(
    layer: DecoderLayer, shared: Pass, kept: Kept, dx: Tensor, dh: Tensor, needs_x: bool, norms: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradients of the residual stream, and of the norms, A and B in the order of `DecoderLayer.trained`.

    Shapes:
        dx and dh (T, C), of the residual stream and of the part to add to it; returns (T, C).
    """
    qkv_proj, o_proj, gate_up_proj, down_proj = layer.linears
    fp8 = [linear.product.takes_fp8 for linear in layer.linears]
    dropouts = [shared.dropouts[linear.index] for linear in layer.linears]
    k = kept

    rows = shared.take_handed_down(dh) or (kernels.quantize(dh.contiguous()) if fp8[3] else Rows(dh.contiguous()))
    product = kernels.swiglu(k.gate_up)[0].values if k.product is None else k.product
    down = down_proj.backward(rows, product, k.down4, dropouts[3])
    del product
    of_gate_up = kernels.swiglu_backward(down.x, k.gate_up, down.adapter, dropouts[3], fp8[2])
    down = down.of_adapter()

    y2 = kernels.norm_again(k.x2, layer.norms[1], k.inverse2) if k.y2 is None else k.y2
    gate_up = gate_up_proj.backward(of_gate_up, y2, k.down3, dropouts[2])
    del of_gate_up, y2
    gate_up, of_norm2 = _norm_weight(gate_up, layer.norms[1], dropouts[2], norms[1], k.x2, k.inverse2)
    of_x2 = kernels.norm_backward(
        gate_up.x, k.x2, k.inverse2, layer.norms[1], dx.contiguous(), gate_up.adapter, dropouts[2], fp8[1]
    )
    gate_up = gate_up.of_adapter()

    flat = k.heads.reshape(len(k.heads), -1)
    o = o_proj.backward(of_x2, flat, k.down2, dropouts[1])
    of_heads = o.x if o.adapter is None or dropouts[1] is None else kernels.add_dropped_(o.x, o.adapter, dropouts[1])
    context = (k.attention1, k.attention2, k.attention3)
    query, key, value = layer.split(k.qkv)
    of_rotated = shared.attention.gradients(of_heads.view_as(k.heads), query, key, value, k.heads, context)
    o = o.of_adapter()
    del of_heads
    of_qkv = kernels.rotate_backward(*of_rotated, shared.cos, shared.sin, fp8[0])
    del of_rotated

    y1 = kernels.norm_again(k.x1, layer.norms[0], k.inverse1) if k.y1 is None else k.y1
    qkv = qkv_proj.backward(of_qkv, y1, k.down1, dropouts[0], needs_x or norms[0])
    del of_qkv, y1
    qkv, of_norm1 = _norm_weight(qkv, layer.norms[0], dropouts[0], norms[0], k.x1, k.inverse1)
    of_x1 = None
    if needs_x:
        takes_fp8 = fp8[3]  # as in the previous layer
        of_x1 = kernels.norm_backward(
            qkv.x, k.x1, k.inverse1, layer.norms[0], of_x2.values, qkv.adapter, dropouts[0], takes_fp8
        )
        shared.handed_down = of_x1 if takes_fp8 else None
    adapters = [item for one in (qkv, o, gate_up, down) for item in (one.down, one.up)]
    return None if of_x1 is None else of_x1.values, [of_norm1, of_norm2, *adapters]


def _norm_weight(
    linear: Gradients, weight: Tensor, dropout: Dropout | None, wanted: bool, x: Tensor, inverse: Tensor
) -> tuple[Gradients, Tensor | None]:
    """Return the gradient of a norm's weight if it trains; then the adapter's part is added to the input's gradient.

    Shapes:
        x (T, C), weight (C), inverse (T); returns (C).
    """
    if not wanted:
        return linear, None
    if linear.adapter is not None and dropout is not None:
        linear = linear._replace(x=kernels.add_dropped_(linear.x, linear.adapter, dropout), adapter=None)
    normal = (x.float() * inverse[:, None]).to(x.dtype)
    return linear, (linear.x.float() * normal.float()).sum(0).to(weight.dtype)
