"""Hold all decoder layers of a model: products of the frozen weights, working copies of the adapters.

`DecoderStack` needs Triton. It reads no values from the device, so a CUDA graph can record it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from philora.decoder_stack.facts import NORMS, adapter_name_of, base_of, linears_of, norm_of
from philora.decoder_stack.host_inputs import HostInputs
from philora.decoder_stack.layer import AdaptedLinear, Adapter, DecoderLayer, Keep, Pass
from philora.decoder_stack.products import Buffer, Scaling, product_of
from philora.decoder_stack.rows import Dropout
from philora.kernels.layout import PackedLayout
from philora.kernels.varlen import Attention


class Passed(NamedTuple):
    """A forward pass without autograd. Shapes: x and h (T, C).

    Attributes:
        x: The residual stream before the last sum.
        h: The part to add to it.
        shared: State that the layers share.
        saved: Tensors that every layer keeps for backward.
    """

    x: Tensor
    h: Tensor
    shared: Pass
    saved: list[tuple[Tensor | None, ...]]


_SEED_OF_LAYER, _SEED_OF_PASS = 2654435761, 1000003


def parts_of(model: Any) -> list[tuple[Any, ...]]:
    """Return the parts of a model that a stack is made of. If one is replaced, a new stack is needed."""
    found: list[tuple[Any, ...]] = []
    for layer in list(model.layers)[: model.config.num_hidden_layers]:
        found += [(norm_of(layer, name).weight,) for name in NORMS]
        for linear in linears_of(layer):
            name = adapter_name_of(linear)
            if name is None:
                found.append((base_of(linear).weight,))
            else:
                own = linear.lora_A[name].weight, linear.lora_B[name].weight, linear.lora_dropout[name]
                found.append((base_of(linear).weight, *own, float(linear.scaling[name])))
    return found


def seeds_of(counter: Tensor, linears: int) -> Tensor:
    """Return a seed for every linear layer from the number of a forward pass. Shapes: (1); returns (linears)."""
    return torch.arange(linears, device=counter.device) * _SEED_OF_LAYER + counter * _SEED_OF_PASS


def _same(mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> bool:
    """Return whether the tensors and modules are identical, and the scalings equal."""
    return len(mine) == len(theirs) and all(
        a == b if isinstance(a, float) else a is b for a, b in zip(mine, theirs, strict=True)
    )


class DecoderStack:
    """The decoder layers of a `Phi3Model` for which `choice.stack_for` chooses the stack.

    Args:
        model: The decoder; it is not changed.
        dtype: Dtype of the activations.
        fp8: The scaling of the base's products in fp8; None for products in `dtype`, dequantised if needed.

    Cost:
        A copy of every adapter in `dtype`; with fp8 the cost of `Fp8Product`; over a quantised base one matrix.
    """

    def __init__(self, model: Any, dtype: torch.dtype, fp8: Scaling | None = None) -> None:
        config = model.config
        self.dtype, self.fp8, self.parts = dtype, fp8, parts_of(model)
        heads = (config.num_attention_heads, config.num_key_value_heads)
        size = getattr(config, "head_dim", None) or config.hidden_size // heads[0]
        self._scaling = size**-0.5
        self._window: int | None = getattr(config, "sliding_window", None)
        self._buffer, self._adapters, self._layers = Buffer(), list[Adapter](), list[DecoderLayer]()
        for index, layer in enumerate(list(model.layers)[: config.num_hidden_layers]):
            norms = norm_of(layer, NORMS[0]), norm_of(layer, NORMS[1])
            q, o, g, d = (self._linear(4 * index + at, item) for at, item in enumerate(linears_of(layer)))
            weights = norms[0].weight, norms[1].weight
            self._layers.append(DecoderLayer(index, weights, norms[0].variance_epsilon, (q, o, g, d), heads, size))

    def _linear(self, index: int, linear: Any) -> AdaptedLinear:
        product = product_of(base_of(linear), self._buffer, self.fp8)
        name = adapter_name_of(linear)
        if name is None:
            return AdaptedLinear(index, product, None)
        down, up = linear.lora_A[name].weight, linear.lora_B[name].weight
        working = [torch.empty_like(item, dtype=self.dtype, requires_grad=False) for item in (down, up)]
        scaling = float(linear.scaling[name])
        adapter = Adapter(down, up, working[0], working[1], scaling, linear.lora_dropout[name])
        self._adapters.append(adapter)
        return AdaptedLinear(index, product, adapter)

    def is_for(self, model: Any, dtype: torch.dtype, fp8: Scaling | None) -> bool:
        """Return whether a new stack for this model would be the same."""
        if self.dtype != dtype or self.fp8 != fp8:
            return False
        now = parts_of(model)
        return len(now) == len(self.parts) and all(map(_same, self.parts, now))

    @torch.no_grad()
    def _cast_adapters(self) -> None:
        """Round A and scaling · B of all adapters to the dtype of the products."""
        if not self._adapters:
            return
        working_up = [adapter.working_up for adapter in self._adapters]
        working = [adapter.working_down for adapter in self._adapters] + working_up
        trained: list[Tensor] = [adapter.down for adapter in self._adapters]
        torch._foreach_copy_(working, [*trained, *(adapter.up for adapter in self._adapters)])
        torch._foreach_mul_(working_up, [adapter.scaling for adapter in self._adapters])

    def _dropouts(self, counter: Tensor | None) -> list[Dropout | None]:
        """Return the dropout of every linear layer in this pass, None where it is off. Shapes: counter (1)."""
        chances = self.chances()
        if counter is None or not any(chances):
            return [None] * len(chances)
        seeds = seeds_of(counter, len(chances))
        return [Dropout(seeds[at : at + 1], p) if p > 0 else None for at, p in enumerate(chances)]

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, *,
        keep: Keep = "everything", counter: Tensor | None = None, deterministic: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the residual stream before the last sum, and the part to add to it.

        Args:
            x: Embeddings of the tokens.
            cos, sin: Of the rotary embedding, one of the two equal halves.
            layout: The documents.
            keep: What is kept for backward.
            counter: Number of this forward pass, for dropout's masks; None for no dropout.
            deterministic: Whether backward repeats its bits.

        Shapes:
            x (T, C), cos and sin (T, half of the rotated columns) in fp32, counter (1); returns (T, C) twice.
        """
        shared = self._begin(x, cos, sin, layout, keep, counter, deterministic)
        passes = {x.device: shared}  # with a `device_map` layers are on several devices
        h: Tensor | None = None
        for layer in self._layers:
            device = layer.device
            if device not in passes:
                passes[device] = shared.on(device)
            x, h = layer(passes[device], x.to(device), None if h is None else h.to(device))
        assert h is not None
        return x, h

    def _begin(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, keep: Keep, counter: Tensor | None,
        deterministic: bool,
    ) -> Pass:  # fmt: skip
        """Round the adapters, and return the state that the layers share in a pass."""
        self._cast_adapters()
        window = self._window if self._window is not None and self._window < layout.longest_tokens else None
        attention = Attention(layout, self._scaling, window, deterministic)
        host = HostInputs(x.device) if keep == "host" else None
        return Pass(attention, cos, sin, self._dropouts(counter), keep, host)

    # -- without autograd, for graphs

    @property
    def trained(self) -> list[Tensor | None]:
        """Return the parameters that can train, in the order of the gradients of `backward`."""
        return [item for layer in self._layers for item in layer.trained]

    def addresses(self) -> list[int]:
        """Return the addresses of the weights."""
        return [item.data_ptr() for part in self.parts for item in part if isinstance(item, Tensor)]

    def chances(self) -> list[float]:
        """Return the current probabilities of dropout of the linear layers."""
        adapters = [linear.adapter for layer in self._layers for linear in layer.linears]
        modules = [None if adapter is None else adapter.dropout for adapter in adapters]
        return [
            float(getattr(module, "p", 0.0)) if module is not None and module.training else 0.0 for module in modules
        ]

    @torch.no_grad()
    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackedLayout, *,
        keep: Keep = "everything", counter: Tensor | None = None, deterministic: bool = True,
    ) -> Passed:  # fmt: skip
        """Compute the same as `__call__`, without autograd. Arguments and shapes are the same."""
        shared = self._begin(x, cos, sin, layout, keep, counter, deterministic)
        h: Tensor | None = None
        saved = []
        for layer in self._layers:
            x, h, kept = layer.forward(shared, x, h)
            saved.append(kept)
        assert h is not None
        return Passed(x, h, shared, saved)

    @torch.no_grad()
    def backward(
        self, passed: Passed, dx: Tensor, dh: Tensor, needs_x: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradients of x and of the parameters, in the order of `trained`; None for frozen ones.

        The tensors that `passed` keeps are freed layer by layer.

        Shapes:
            dx and dh (T, C), of what `forward` returned; returns (T, C).
        """
        found: list[Tensor | None] = []
        for layer in reversed(self._layers):
            wanted = [item is not None and item.requires_grad for item in layer.trained]
            more = needs_x or layer.index > 0
            grad, grads = layer.backward(passed.shared, passed.saved.pop(), dx, dh, more, wanted[:2])
            found = [item if want else None for item, want in zip(grads, wanted, strict=True)] + found
            if grad is None:
                return None, found
            dx = dh = grad
        return dx, found
