"""One new token for each of several rows: the forward pass of generation alone, for the Phi-3 architecture.

    prompts -> `prefill`, right-padded and causal -> keys and values in each row's own slots -> logits of the last token
    tokens  -> `step` -> logits of the next one

transformers' forward serves training too, so each token of `generate` pays for masks, cache objects and modules that
one new token does not need, and on a CPU each bf16 product reorders its weight first. Here the weights are reordered
once, the cache has room ahead, and every row stands at its own position: rows of any length share a batch without
padding between prompt and answer, and a row that has ended makes room for the next prompt at once.

`philora.generation.batches` uses this where `covers` says so, and transformers' `generate` everywhere else.
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
"""Tokens of prompts at once, padding included; a longer prompt is taken alone."""

PACKED_SHARE = 0.5
"""Weights are reordered where the copies take less than this share of the free memory."""

ROOM_TOKENS = 64
"""The cache grows by this, and by a quarter of itself where that is more."""

Product = Callable[[Tensor], Tensor]


def covers(model: nn.Module) -> bool:
    """Return whether `Decoder` computes what this model computes.

    It does for plain Phi-3 models on one device with SiLU and no autocast, whatever adapters and quantised layers stand
    in the place of their linear layers, and unless hooks watch their modules or `PHILORA_FUSED=0` turns fast paths off.
    """
    devices = {parameter.device for parameter in _base(model).parameters()}
    types = {device.type for device in devices}
    if len(devices) != 1 or "meta" in types or torch.is_autocast_enabled(next(iter(types))):
        return False
    return _plain(model)


def packs(model: nn.Module, device: str, dtype: torch.dtype) -> bool:
    """Return whether `Decoder` holds reordered weights of this model besides, where memory lets it.

    Args:
        model: As `covers` takes it; it needs no weights.
        device: Where it generates.
        dtype: Of its weights.
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
    """Return whether the model is the architecture that is computed here, with nothing that watches its modules."""
    base = _base(model)
    if type(base) is not Phi3ForCausalLM or not fused_enabled() or hasattr(base, "_hf_hook"):
        return False
    if hasattr(model, "peft_config") and any(
        value.is_prompt_learning for value in cast(Any, model).peft_config.values()
    ):
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
    """The modules whose forward is passed over."""
    return [item for layer in base.model.layers for item in (layer, layer.self_attn, layer.mlp)]


class Norm(NamedTuple):
    """An RMSNorm without what autograd needs.

    Attributes:
        product: The norm of a matrix's rows.
        weight: Its weight; None where it is no plain RMSNorm.
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
    """A model's forward pass over new tokens, with the cache of the rows it works on. To be used without gradients.

    Args:
        model: A model that `covers` accepts, or a PeftModel around one. Adapters count as they are at this moment.
        rows: Rows of the cache.
        limit_tokens: Positions of the longest row, prompt and answer. With LongRoPE it decides the factors, as the
            longest row of a batch does in transformers.
        packing: Of another decoder over the same base, so that its reordered weights are held once.

    Cost:
        Where `packs` says so a reordered copy of every linear layer's weight, unless half of the free memory is too
        little for them; keys and values of the positions in use, and a quarter more.
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
        # Of `rotate_half` the sign stands here: a·cos + rotate_half(a)·sin = a·cos + roll(a)·(∓sin).
        self.cos, self.sin = cos, torch.cat((-sin[:, :half], sin[:, half:]), -1)
        self.dtype = probe.dtype
        self.rows, self.capacity = rows, 0
        self.cache: list[tuple[Tensor, Tensor]] = [(self._room(rows, 0), self._room(rows, 0)) for _ in self.layers]

    def _room(self, rows: int, tokens: int) -> Tensor:
        """Shapes: (rows, K, tokens, D)."""
        # Zeros: what is not written yet is masked, and a masked NaN would still be one.
        return torch.zeros(rows, self.kv_heads, tokens, self.head_size, dtype=self.dtype, device=self.device)

    def reserve(self, tokens: int) -> None:
        """See to it that rows have space for so many tokens."""
        if tokens <= self.capacity:
            return
        grown = self.capacity_for(tokens)
        for index, pair in enumerate(self.cache):
            bigger = []
            for old in pair:
                new = self._room(self.rows, grown)
                new[:, :, : self.capacity] = old
                bigger.append(new)
            self.cache[index] = (bigger[0], bigger[1])
        self.capacity = grown

    def capacity_for(self, tokens: int) -> int:
        """Return how many tokens a row of the cache gets when it needs so many, more than it has."""
        return min(len(self.cos), max(tokens, self.capacity + max(ROOM_TOKENS, self.capacity // 4)))

    def keep(self, rows: Sequence[int], more: int = 0) -> None:
        """Continue with some rows only, at 0, 1, ... in the order given, and `more` empty ones after them."""
        if not rows:
            self.capacity = 0
        chosen = torch.tensor(rows, dtype=torch.long, device=self.device)
        empty = self._room(more, self.capacity)
        self.rows = len(rows) + more
        for index, (keys, values) in enumerate(self.cache):  # one by one: both copies of a layer, not of all
            self.cache[index] = (
                torch.cat((keys[chosen, :, : self.capacity], empty)),
                torch.cat((values[chosen, :, : self.capacity], empty)),
            )

    def prefill(self, prompts: Sequence[Sequence[int]], places: Sequence[int]) -> Tensor:
        """Read prompts into rows of the cache.

        Args:
            prompts: Token ids, at least one each; prompts of similar length cost the least padding.
            places: The row of each.

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
            # Causal, and what pads a row stands behind it: no token sees any.
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=grouped,
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
            tokens: Of every row of the cache; any for a row that is not in use.
            positions: Where it stands in its row; 0 for a row that is not in use.

        Shapes:
            Returns the logits after it, (B, V).
        """
        width = max(positions) + 1
        self.reserve(width)
        at = torch.tensor(positions, device=self.device)
        return self.compute(torch.tensor(tokens, device=self.device), at, width, PlainRows())

    def compute(self, tokens: Tensor, at: Tensor, width: int, work: PlainRows) -> Tensor:
        """Add a token to every row, with nothing read back from the device.

        Args:
            tokens: Of every row of the cache.
            at: Where it stands in its row, below `width`.
            width: How much of the cache is looked at.
            work: Does what is between the products.

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
            # The query heads that share keys stand beside each other, like queries of one head.
            query = turned[:, : self.heads].view(rows, self.kv_heads, -1, self.head_size)
            mixed = F.scaled_dot_product_attention(
                query, keys[:, :, :width], values[:, :, :width], mask, scale=self.scale
            )
            x, normed = work.add_norm(layer.between, x, layer.output(mixed.reshape(rows, -1)))
            h = layer.down(work.gated(layer.gate_up(normed)))
        return self.head(work.add_norm(self.norm, x, h)[1])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, the sign of `rotate_half` in `sin`.

    Shapes:
        x (..., heads, D), cos and sin (..., 1, rotated columns); returns as x.
    """
    columns = cos.shape[-1]
    if columns == x.shape[-1]:
        return x * cos + x.roll(columns // 2, -1) * sin
    part = x[..., :columns]
    return torch.cat((part * cos + part.roll(columns // 2, -1) * sin, x[..., columns:]), -1)


def _gated(gate_up: Tensor) -> Tensor:
    """Shapes: (B, 2 C), gate first; returns (B, C)."""
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
    """Products of linear layers, over weights in the order that oneDNN multiplies them in.

    Args:
        model: Whose layers; a PeftModel or its base.
        rows: About as many as there will be in a step.
    """

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
        """The function of a linear layer, of PEFT's layer over one, or of any other module."""
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
        # Anything else is asked as it would be by the model: with three dimensions.
        return lambda x: cast(Tensor, module(x[None])[0])

    def _linear(self, weight: Tensor, bias: Tensor | None) -> Product:
        packed = self._packed(weight)
        if packed is None:
            return lambda x: F.linear(x, weight, bias)
        product = torch.ops.mkldnn._linear_pointwise
        return lambda x: cast(Tensor, product(x, packed, bias, "none", [], ""))

    def _adapted(self, base: Product, down: Tensor, up: Tensor, scaling: float, dtype: torch.dtype) -> Product:
        """`base(x) + scaling * x A^T B^T`, A and B rounded to the base's dtype as in training."""
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
