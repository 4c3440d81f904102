"""Compute one new token for each of several rows: the forward pass of generation for the Phi-3 architecture.

    prompts -> `prefill`, right-padded and causal -> keys and values in the row's cache -> logits of the last token
    tokens  -> `step` -> logits of the next one

transformers' forward also serves training. Each token of its `generate` pays for masks, cache objects and modules that
one new token does not need, and on a CPU each bf16 product reorders its weight first. Here the weights are reordered
once, the cache has spare capacity, and every row has its own position. So rows of any length share a batch without
padding between prompt and answer, and the next prompt can take a row as soon as it has ended.

`philora.generation.batches` uses this for models that `covers` accepts, and transformers' `generate` for others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3ForCausalLM, Phi3MLP, Phi3RMSNorm

from philora.adapters.fast_layers import FastLinear
from philora.kernels.memory import free_bytes
from philora.kernels.modules import FastPhi3RMSNorm
from philora.kernels.rotary import note_documents
from philora.lora.functional import fused_enabled
from philora.native import library as native
from philora.runtime import processes

PREFILL_TOKENS = 4096
"""Tokens of prompts that are read together, including padding; a longer prompt is read alone."""

PACKED_SHARE = 0.5
"""Weights are reordered if the copies take less than this share of the free memory."""

GROWTH_TOKENS = 64
"""The cache grows by this, or by a quarter of itself if that is more."""

Product = Callable[[Tensor], Tensor]


def covers(model: nn.Module) -> bool:
    """Return whether `Decoder` computes what this model computes.

    It does for Phi-3 models on one device with SiLU and without autocast, with any adapters and quantised layers,
    unless there are hooks on their modules or `PHILORA_FUSED=0` turns fast paths off.
    """
    devices = {parameter.device for parameter in _base(model).parameters()}
    types = {device.type for device in devices}
    if len(devices) != 1 or "meta" in types or torch.is_autocast_enabled(next(iter(types))):
        return False
    return _plain(model)


def packs(model: nn.Module, device: str, dtype: torch.dtype) -> bool:
    """Return whether `Decoder` keeps reordered copies of this model's weights, if memory allows it.

    `device` is the one that generates; the model needs no weights.
    """
    return (
        device == "cpu"
        and dtype == torch.bfloat16
        and torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and _plain(model)
    )


def _plain(model: nn.Module) -> bool:
    """Return whether the model has the architecture that is computed here, and no hooks on its modules."""
    base = _base(model)
    if type(base) is not Phi3ForCausalLM or not fused_enabled() or hasattr(base, "_hf_hook"):
        return False
    if any(value.is_prompt_learning for value in getattr(cast(Any, model), "peft_config", {}).values()):
        return False
    watched = (
        hook
        for module in (model, base, base.model, *_decoder_modules(base))
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if hook is not note_documents
    )
    plain = all(
        isinstance(layer.self_attn, Phi3Attention)
        and isinstance(layer.mlp, Phi3MLP)
        and isinstance(layer.mlp.activation_fn, SiLUActivation | nn.SiLU)
        for layer in base.model.layers
    )
    return plain and next(watched, None) is None


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _decoder_modules(base: Any) -> list[nn.Module]:
    """Return the modules whose forward is not called."""
    return [item for layer in base.model.layers for item in (layer, layer.self_attn, layer.mlp)]


class Norm(NamedTuple):
    """An RMSNorm without what autograd needs.

    Attributes:
        product: Computes the norm of a matrix's rows.
        weight: Its weight; None if it is not a plain RMSNorm.
        eps: Added to the mean square.
    """

    product: Product
    weight: Tensor | None
    eps: float


class _Layer(NamedTuple):
    """A decoder layer's products and norms."""

    before: Norm
    qkv: Product
    output: Product
    between: Norm
    gate_up: Product
    down: Product


class PlainRows:
    """The element-wise work of a step in PyTorch's own operations."""

    def add_norm(self, norm: Norm, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of x and h, and its norm. Shapes: x and h (B, C); returns (B, C) twice."""
        total = x if h is None else x + h
        return total, norm.product(total)

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines as `rotate` takes them. Shapes: (B, rotated columns)."""
        return cos[:, None], sin[:, None]

    def rotate(self, states: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        """Return the first heads, rotated. Shapes: states (B, H + 2 K, D); returns (B, heads, D)."""
        return _rotate(states[:, :heads], cos, sin)

    def gated(self, gate_up: Tensor) -> Tensor:
        """Return `silu(gate) * up`. Shapes: (B, 2 I), gate first; returns (B, I)."""
        return _gated(gate_up)


class Decoder:
    """A model's forward pass over new tokens, with the cache of its rows. To be used without gradients.

    Args:
        model: A model that `covers` accepts, or a PeftModel around one. Its adapters are used as they are now.
        rows: Rows of the cache.
        limit_tokens: Positions of the longest row, prompt and answer. With LongRoPE it decides the factors, like the
            longest row of a batch does in transformers.
        packing: The packing of another decoder over the same base, so that reordered weights are kept once.

    Cost:
        If `packs` is true, a reordered copy of every linear layer's weight, unless they need more than half of the free
        memory; keys and values of the positions in use, and a quarter more.
    """

    def __init__(self, model: nn.Module, rows: int, limit_tokens: int, packing: Packing | None = None) -> None:
        base = _base(model)
        config = base.config
        self.heads, self.kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.window = getattr(config, "sliding_window", None)
        attention = base.model.layers[0].self_attn
        self.head_size, self.scale = int(attention.head_dim), float(attention.scaling)
        self.embed = base.model.embed_tokens
        weight = next(parameter for parameter in base.model.layers.parameters() if parameter.is_floating_point())
        self.device = weight.device
        packing = packing or Packing(base, rows)
        self.layers = [
            _Layer(
                _norm(layer.input_layernorm),
                packing.product(layer.self_attn.qkv_proj),
                packing.product(layer.self_attn.o_proj),
                _norm(layer.post_attention_layernorm),
                packing.product(layer.mlp.gate_up_proj),
                packing.product(layer.mlp.down_proj),
            )
            for layer in base.model.layers
        ]
        self.norm, self.head = _norm(base.model.norm), packing.product(base.lm_head)
        probe = self.embed(torch.zeros(1, 1, dtype=torch.long, device=self.device))
        places = torch.arange(limit_tokens, device=self.device)[None]
        cos, sin = (item[0] for item in base.model.rotary_emb(probe, places))
        half = sin.shape[-1] // 2
        # The sign of `rotate_half` is part of sin: a·cos + rotate_half(a)·sin = a·cos + roll(a)·(∓sin).
        self.cos, self.sin = cos, torch.cat((-sin[:, :half], sin[:, half:]), -1)
        self.dtype = probe.dtype
        self.rows, self.capacity = rows, 0
        self.cache: list[tuple[Tensor, Tensor]] = [(self._empty(rows, 0), self._empty(rows, 0)) for _ in self.layers]

    def _empty(self, rows: int, tokens: int) -> Tensor:
        """Return an empty cache. Shapes: (rows, K, tokens, D)."""
        # Zeros, because unwritten positions are masked, and a masked NaN would still be NaN.
        return torch.zeros(rows, self.kv_heads, tokens, self.head_size, dtype=self.dtype, device=self.device)

    def reserve(self, tokens: int) -> None:
        """Grow the cache if its rows have less capacity than so many tokens."""
        if tokens <= self.capacity:
            return
        grown = self.capacity_for(tokens)
        for index, pair in enumerate(self.cache):
            bigger = []
            for old in pair:
                new = self._empty(self.rows, grown)
                new[:, :, : self.capacity] = old
                bigger.append(new)
            self.cache[index] = (bigger[0], bigger[1])
        self.capacity = grown

    def capacity_for(self, tokens: int) -> int:
        """Return the new capacity of a row of the cache that needs more tokens than it has."""
        return min(len(self.cos), max(tokens, self.capacity + max(GROWTH_TOKENS, self.capacity // 4)))

    def keep(self, rows: Sequence[int], more: int = 0) -> None:
        """Keep some rows only, at 0, 1, ... in the order given, followed by `more` empty ones."""
        if not rows:
            self.capacity = 0
        chosen = torch.tensor(rows, dtype=torch.long, device=self.device)
        empty = self._empty(more, self.capacity)
        self.rows = len(rows) + more
        for index, (keys, values) in enumerate(self.cache):  # one by one: both copies of a layer, not of all
            self.cache[index] = (
                torch.cat((keys[chosen, :, : self.capacity], empty)),
                torch.cat((values[chosen, :, : self.capacity], empty)),
            )

    def prefill(self, prompts: Sequence[Sequence[int]], places: Sequence[int]) -> Tensor:
        """Read prompts into rows of the cache.

        Args:
            prompts: Token ids, at least one for each; prompts of similar length need the least padding.
            places: The row of every prompt.

        Shapes:
            Returns the logits after every prompt's last token, (B, V).
        """
        parts: list[list[int]] = []
        part: list[int] = []
        width = 0
        for index, prompt in enumerate(prompts):
            width = max(width, len(prompt))
            if part and (len(part) + 1) * width > PREFILL_TOKENS:
                parts.append(part)
                part, width = [], len(prompt)
            part.append(index)
        logits = [
            self._prefill([prompts[item] for item in part], [places[item] for item in part]) for part in (*parts, part)
        ]
        return torch.cat(logits)

    def _prefill(self, prompts: Sequence[Sequence[int]], places: Sequence[int]) -> Tensor:
        lengths = [len(item) for item in prompts]
        rows, tokens = len(prompts), max(lengths)
        self.reserve(tokens)
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        chosen = torch.tensor(places, device=self.device)
        last = torch.tensor([row * tokens + length - 1 for row, length in enumerate(lengths)], device=self.device)
        mask = None
        if self.window is not None and tokens > self.window:
            apart = torch.arange(tokens, device=self.device)[:, None] - torch.arange(tokens, device=self.device)
            mask = (apart >= 0) & (apart < self.window)
        cos, sin = self.cos[:tokens, None], self.sin[:tokens, None]
        grouped = self.heads != self.kv_heads
        x = self.embed(ids.to(self.device).flatten())
        for index, layer in enumerate(self.layers):
            states = layer.qkv(layer.before.product(x)).view(rows, tokens, -1, self.head_size)
            turned = _rotate(states[:, :, : self.heads + self.kv_heads], cos, sin).transpose(1, 2)
            query, key = turned[:, : self.heads], turned[:, self.heads :]
            value = states[:, :, self.heads + self.kv_heads :].transpose(1, 2)
            keys, values = self.cache[index]
            keys[chosen, :, :tokens], values[chosen, :, :tokens] = key, value
            # Attention is causal and the padding is at the end, so no token sees it.
            mixed = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, scale=self.scale, enable_gqa=grouped
            )
            mixed = mixed.transpose(1, 2).reshape(rows * tokens, -1)
            if index == len(self.layers) - 1:
                mixed, x = mixed[last], x[last]
            x = x + layer.output(mixed)
            x = x + layer.down(_gated(layer.gate_up(layer.between.product(x))))
        return self.head(self.norm.product(x))

    def step(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Add a token to every row.

        Args:
            tokens: The new token of every row of the cache; any for a row that is not in use.
            positions: Its position in the row; 0 for a row that is not in use.

        Shapes:
            Returns the logits after it, (B, V).
        """
        width = max(positions) + 1
        self.reserve(width)
        at = torch.tensor(positions, device=self.device)
        return self.compute(torch.tensor(tokens, device=self.device), at, width, PlainRows())

    def compute(self, tokens: Tensor, at: Tensor, width: int, work: PlainRows) -> Tensor:
        """Add a token to every row, at these positions below `width`, without reading anything back from the device.

        Shapes:
            tokens and at (B); returns the logits after them, (B, V).
        """
        rows = self.rows
        heads = torch.arange(rows * self.kv_heads, device=self.device).view(rows, -1)
        slots = (heads * self.capacity + at[:, None]).flatten()
        apart = at[:, None] - torch.arange(width, device=self.device)
        hidden = apart < 0
        if self.window is not None and width > self.window:
            hidden |= apart >= self.window
        mask = torch.zeros(rows, 1, 1, width, dtype=self.dtype, device=self.device)
        mask.masked_fill_(hidden[:, None, None], -torch.inf)
        cos, sin = work.angles(self.cos[at], self.sin[at])
        turning = self.heads + self.kv_heads
        x, h = self.embed(tokens), None
        for (keys, values), layer in zip(self.cache, self.layers, strict=True):
            x, normed = work.add_norm(layer.before, x, h)
            states = layer.qkv(normed).view(rows, -1, self.head_size)
            turned = work.rotate(states, cos, sin, turning)
            keys.view(-1, self.head_size).index_copy_(0, slots, turned[:, self.heads :].flatten(0, 1))
            values.view(-1, self.head_size).index_copy_(0, slots, states[:, turning:].flatten(0, 1))
            # The query heads that share keys are adjacent, like queries of one head.
            query = turned[:, : self.heads].view(rows, self.kv_heads, -1, self.head_size)
            mixed = F.scaled_dot_product_attention(
                query, keys[:, :, :width], values[:, :, :width], mask, scale=self.scale
            )
            x, normed = work.add_norm(layer.between, x, layer.output(mixed.reshape(rows, -1)))
            h = layer.down(work.gated(layer.gate_up(normed)))
        return self.head(work.add_norm(self.norm, x, h)[1])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding; `sin` has the sign of `rotate_half`.

    Shapes:
        x (..., heads, D), cos and sin (..., 1, rotated columns); returns as x.
    """
    columns = cos.shape[-1]
    if columns == x.shape[-1]:
        return x * cos + x.roll(columns // 2, -1) * sin
    part = x[..., :columns]
    return torch.cat((part * cos + part.roll(columns // 2, -1) * sin, x[..., columns:]), -1)


def _gated(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up`. Shapes: (B, 2 C), gate first; returns (B, C)."""
    gate, up = gate_up.chunk(2, -1)
    return up * F.silu(gate)


def _norm(module: nn.Module) -> Norm:
    if type(module) not in (Phi3RMSNorm, FastPhi3RMSNorm):
        return Norm(module, None, 0.0)
    weight, eps = cast(Tensor, module.weight), float(cast(float, module.variance_epsilon))
    if not native.usable(weight):
        return Norm(module, weight, eps)
    return Norm(lambda x: native.rms_norm(x.contiguous(), weight, eps)[0], weight, eps)


class Packing:
    """Products of linear layers over weights that are reordered once for oneDNN, for steps of about `rows` rows."""

    def __init__(self, model: nn.Module, rows: int) -> None:
        base = _base(model)
        self.rows = rows
        self.plain: dict[nn.Linear, Product] = {}
        linear = [module.weight for module in base.modules() if isinstance(module, nn.Linear)]
        needed = sum(item.nbytes for item in linear if item.dtype == torch.bfloat16)
        device = next(base.parameters()).device.type
        free = free_bytes(device) / processes.local_count()
        self.on = packs(base, device, torch.bfloat16) and needed < PACKED_SHARE * free

    def product(self, module: nn.Module) -> Product:
        """Return the function of a linear layer, of PEFT's layer over one, or of any other module."""
        if type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks):
            if module not in self.plain:
                self.plain[module] = self._linear(module.weight, module.bias)
            return self.plain[module]
        if isinstance(module, FastLinear) and type(module.base_layer) is nn.Linear:
            if module.disable_adapters and not module.merged:
                return self.product(module.base_layer)
            adapter = module.plain_adapter()
            if adapter is not None:
                base = self.product(module.base_layer)
                down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
                return self._adapted(base, down, up, float(module.scaling[adapter]), module.base_layer.weight.dtype)
        # Any other module is called as the model does: with three dimensions.
        return lambda x: cast(Tensor, module(x[None])[0])

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Product:
        packed = self._packed(weight)
        if packed is None:
            return lambda x: F.linear(x, weight, bias)
        product = torch.ops.mkldnn._linear_pointwise
        return lambda x: cast(Tensor, product(x, packed, bias, "none", [], ""))

    def _adapted(self, base: Product, down: Tensor, up: Tensor, scaling: float, dtype: torch.dtype) -> Product:
        """Return `base(x) + scaling * x A^T B^T`, with A and B rounded to the base's dtype as in training."""
        into, back = self._linear(down.to(dtype), None), (up * scaling).to(dtype)
        packed = self._packed(back)
        if packed is None:
            columns = back.T
            return lambda x: torch.addmm(base(x), into(x), columns)
        add = torch.ops.mkldnn._linear_pointwise.binary
        return lambda x: cast(Tensor, add(into(x), base(x), packed, None, "add"))

    def _packed(self, weight: Tensor) -> Tensor | None:
        if not self.on or weight.dtype != torch.bfloat16:
            return None
        return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight, self.rows))
