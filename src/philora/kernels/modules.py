"""Give transformers' modules the fast functions: classes that `optimize` sets on existing modules.

Only the class changes; parameters, buffers, names and state dicts are transformers'. Cases that a fast function does
not cover (a cache, a mask, dropout, torch.compile, the switch) run transformers' forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3Attention as PlainPhi3Attention
from transformers.models.phi3.modeling_phi3 import Phi3MLP, Phi3Model, Phi3RMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from philora.kernels.attention import NAME, without_marker
from philora.kernels.document_groups import documents_of, groups_of
from philora.kernels.elementwise import gated, rms_norm, swiglu
from philora.kernels.tiled_attention import rotary_attention
from philora.lora.functional import fused_enabled
from philora.lora.hooks import all_are_hooked, is_hooked
from philora.lora.recomputation import mark

# The row count of a product is rounded up to this, since the first product of a new count costs its preparation.
ROWS_STEP = 64

_wanted: ContextVar[Tensor | None] = ContextVar("philora_wanted_rows", default=None)


@contextmanager
def only_rows(rows: Tensor, tokens: int) -> Iterator[None]:
    """Let the last layer compute only those of the B·T `tokens` in this block whose output will be used, by index.

    It must not be used with gradient checkpointing, which computes the layer again after the block.
    """
    token = _wanted.set(rows if len(rows) + ROWS_STEP < tokens else None)
    try:
        yield
    finally:
        _wanted.reset(token)


def _on_wanted(function: Callable[[Tensor], Tensor], x: Tensor, is_last: bool) -> Tensor:
    """Return `function(x)`; in the last layer only for the wanted tokens, else zero. Shapes: x (B, T, C)."""
    rows = _wanted.get() if is_last else None
    if rows is None:
        return function(x)
    rows = rows.to(x.device)  # with a `device_map` the last layer may be on another device than the labels
    count = len(rows)
    padded = nn.functional.pad(rows, (0, -max(1, count) % ROWS_STEP + (count == 0)))
    y = function(x.reshape(-1, x.shape[-1]).index_select(0, padded)[None])[0]
    full = y.new_zeros(x.shape[0] * x.shape[1], y.shape[-1])
    return full.index_copy(0, rows, y[:count]).view(*x.shape[:-1], -1)


class FastPhi3Attention(PlainPhi3Attention):  # type: ignore[misc]
    """Phi-3's attention, from the fused projection to the output projection in one node on a CPU."""

    is_last = False

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the module. Shapes: hidden_states (B, T, C); returns (B, T, C) and no weights."""
        position_ids = kwargs.get("position_ids")
        if (
            not fused_enabled()
            or hidden_states.device.type != "cpu"
            or self.config._attn_implementation != NAME
            or without_marker(attention_mask) is not None
            or past_key_values is not None
            or position_ids is None
            or (self.training and self.attention_dropout > 0)
        ):
            result = super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
            return cast("tuple[Tensor, Tensor | None]", result)
        rows = len(hidden_states)
        layout = groups_of(documents_of(position_ids, rows, kwargs), rows)
        heads = self.config.num_attention_heads, self.num_key_value_heads
        output = rotary_attention(
            self.qkv_proj(hidden_states),
            *position_embeddings,
            heads,
            layout,
            scaling=self.scaling,
            sliding_window=getattr(self.config, "sliding_window", None),
        )
        return _on_wanted(self.o_proj, output, self.is_last), None


def _is_plain_silu(activation: nn.Module) -> bool:
    """Return whether a feed-forward part may compute silu itself."""
    plain = type(activation) in (SiLUActivation, nn.SiLU) and not is_hooked(activation)
    return plain and fused_enabled() and not all_are_hooked()


class FastPhi3MLP(Phi3MLP):  # type: ignore[misc]
    """Phi-3's feed-forward part with SwiGLU in one node."""

    is_last = False
    recomputes = False  # whether backward computes the output of SwiGLU again

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute the module. Shapes: hidden_states (B, T, C); returns the same."""
        if not _is_plain_silu(self.activation_fn):
            return cast(Tensor, super().forward(hidden_states))
        return _on_wanted(self._feed_forward, hidden_states, self.is_last)

    def _feed_forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(x)
        product = swiglu(gate_up)
        return cast(Tensor, self.down_proj(mark(product, swiglu, gate_up) if self.recomputes else product))


class _FastGatedMLP:
    """A feed-forward part whose gate and up are two projections, over a class of transformers."""

    act_fn: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Compute the module. Shapes: x (B, T, C); returns the same."""
        if not _is_plain_silu(self.act_fn):
            return cast(Tensor, super().forward(x))  # type: ignore[misc]
        return cast(Tensor, self.down_proj(gated(self.gate_proj(x), self.up_proj(x))))


class _FastNorm:
    """RMSNorm in one node, over a class of transformers."""

    weight: nn.Parameter
    variance_epsilon: float
    recomputes = False  # whether backward computes the output again

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Compute the norm. Shapes: hidden_states (..., C); returns the same."""
        plain = hidden_states.dtype == self.weight.dtype and hidden_states.dtype != torch.float64
        if not plain or not fused_enabled():
            return cast(Tensor, super().forward(hidden_states))  # type: ignore[misc]
        eps = self.variance_epsilon
        y = rms_norm(hidden_states, self.weight, eps)
        return mark(y, lambda x, weight: rms_norm(x, weight, eps), hidden_states, self.weight) if self.recomputes else y


def _fast(own: type, plain: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fast{plain.__name__}", (own, plain), {"__doc__": own.__doc__, "__module__": __name__})


FastPhi3RMSNorm = _fast(_FastNorm, Phi3RMSNorm)
FastLlamaRMSNorm = _fast(_FastNorm, LlamaRMSNorm)
FastMistralRMSNorm = _fast(_FastNorm, MistralRMSNorm)
FastQwen2RMSNorm = _fast(_FastNorm, Qwen2RMSNorm)
FastQwen3RMSNorm = _fast(_FastNorm, Qwen3RMSNorm)
FastLlamaMLP = _fast(_FastGatedMLP, LlamaMLP)
FastMistralMLP = _fast(_FastGatedMLP, MistralMLP)
FastQwen2MLP = _fast(_FastGatedMLP, Qwen2MLP)
FastQwen3MLP = _fast(_FastGatedMLP, Qwen3MLP)

_OWN = (
    FastPhi3Attention, FastPhi3MLP, FastPhi3RMSNorm, FastLlamaRMSNorm, FastMistralRMSNorm, FastQwen2RMSNorm,
    FastQwen3RMSNorm, FastLlamaMLP, FastMistralMLP, FastQwen2MLP, FastQwen3MLP,
)  # fmt: skip
FAST: dict[type[nn.Module], type[nn.Module]] = {own.__bases__[-1]: own for own in _OWN}
"""transformers' classes and the fast classes that replace them, which have the same names."""

for _plain, _own in FAST.items():
    _own.__name__ = _plain.__name__  # pickle and `repr` of the class go by the qualified name, which stays


def use_fast_modules(model: nn.Module) -> None:
    """Replace the classes of modules by their fast classes, in place."""
    for module in model.modules():
        fast = FAST.get(type(module))
        if fast is not None:
            module.__class__ = fast
    for module in model.modules():
        if isinstance(module, Phi3Model):
            last = module.layers[-1]
            last.self_attn.is_last = last.mlp.is_last = True


def recompute_elementwise(model: nn.Module, on: bool) -> list[str]:
    """Switch recomputation in every fast RMSNorm and SwiGLU of a model on or off, and return the kinds found."""
    found = set()
    for module in model.modules():
        if isinstance(module, _FastNorm | FastPhi3MLP):
            module.recomputes = on
            found.add("SwiGLU" if isinstance(module, FastPhi3MLP) else "RMSNorm")
    return sorted(found)


def recomputes_elementwise(model: nn.Module) -> bool:
    """Return whether `recompute_elementwise` has switched recomputation on in any module."""
    return any(module.recomputes for module in model.modules() if isinstance(module, _FastNorm | FastPhi3MLP))
