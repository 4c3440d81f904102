"""Give PEFT's LoRA layers a fused forward; `optimize` puts them and the other fast parts into a model."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from transformers import PreTrainedModel

from philora.adapters.slices import Slices, keep_zeros
from philora.decoder_stack.facts import active_adapter, not_one_adapter
from philora.decoder_stack.model import use_decoder_stack
from philora.errors import ConfigError, fault
from philora.kernels import attention
from philora.kernels.memory import keep_freed_memory, return_large_blocks
from philora.kernels.modules import recompute_elementwise, use_fast_modules
from philora.kernels.quantization import QuantizedWeight, is_quantized, keep_layout, shares_memory
from philora.kernels.rotary import use_document_rotary
from philora.lora.functional import fused_enabled, lora_linear, lora_sliced_linear
from philora.lora.hooks import all_are_hooked, is_hooked, is_of, is_patched

logger = logging.getLogger(__name__)


class FastForward:
    """Compute the forward of PEFT's LoRA layer as one autograd node if the layer is plain (`not_plain`)."""

    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_variant: dict[str, Any]
    lora_bias: dict[str, bool]
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    recomputes = False  # whether backward draws dropout's mask again

    @property
    def slices(self) -> dict[str, Slices]:
        """Return the slices of every adapter that has some. They are an attribute of its B."""
        return {name: up.slice_layout for name, up in self.lora_B.items() if hasattr(up, "slice_layout")}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute PEFT's forward. Shapes: x (..., in); returns (..., out)."""
        why = "arguments" if args or kwargs else not_plain(cast(LoraLayer, self))
        if why is not None:
            if why == _SHARDED_ALONE:
                _warn_sharded_alone()
            if self.disable_adapters and not (self.merged or args or kwargs) and _evaluates_quantized(self.base_layer):
                # Here bitsandbytes would round the activations to 8 bits, which it does not do in training.
                return QuantizedWeight(self.base_layer).product(x, self.base_layer.bias)
            keep_zeros(cast(LoraLayer, self))
            return cast(Tensor, super().forward(x, *args, **kwargs))  # type: ignore[misc]
        adapter = active_adapter(self)
        base, dropout = self.base_layer, self.lora_dropout[adapter]
        up = self.lora_B[adapter]
        adapters = (self.lora_A[adapter].weight, up.weight)
        p = float(getattr(dropout, "p", 0.0))
        scaling = float(self.scaling[adapter])
        if is_fx_symbolic_tracing():  # PEFT's own forward branches on the dtype of x, which is unknown then
            return cast(Tensor, base(x) + up(self.lora_A[adapter](dropout(x))) * scaling)
        slices = getattr(up, "slice_layout", None)
        weight, bias, dtype = base.weight, base.bias, x.dtype
        if type(base) is not nn.Linear:
            weight = QuantizedWeight(base)
            x = x.to(weight.compute_dtype or dtype)
            bias = None if bias is None else bias.to(x.dtype)
        if slices:
            blocks = [part[1:] for part in slices]
            y = lora_sliced_linear(x, weight, bias, *adapters, blocks, scaling, p, dropout.training, self.recomputes)
        else:
            y = lora_linear(x, weight, bias, *adapters, scaling, p, dropout.training, self.recomputes)
        return y if type(base) is nn.Linear else y.to(dtype)

    def plain_adapter(self) -> str | None:
        """Return the name of the one adapter that the fused function can compute, or None."""
        return None if not_plain(cast(LoraLayer, self)) else active_adapter(self)


_SHARDED_ALONE = "FSDP shards its parts separately"


def not_plain(layer: LoraLayer) -> str | None:
    """Return why a LoRA layer needs PEFT's own forward; None if it is plain.

    A layer is plain if one function of its weights computes the same. It has one active adapter without a variant
    (DoRA, ...) or a bias of B, is neither merged nor disabled, and its scaling is a number. The fused function does not
    call the inner modules, so they must have no hooks, replaced forward, parametrizations or weights of other classes.
    """
    why = not_one_adapter(layer)
    if why is not None:
        return why
    adapter = active_adapter(layer)
    if type(layer.scaling[adapter]) not in (float, int):
        return "its scaling is not a plain number"
    base, dropout = layer.base_layer, layer.lora_dropout[adapter]
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    if not _is_plain_base(base) or type(down) is not nn.Linear or type(up) is not nn.Linear:
        sharded = any(isinstance(entry, FSDPModule | FullyShardedDataParallel) for entry in (base, down, up))
        return _SHARDED_ALONE if sharded else "its parts are not plain linear layers"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return "its dropout is another module"
    if is_fx_symbolic_tracing():
        return None  # it replaces every module's call and has proxies in place of weights
    weights = (down.weight, up.weight, base.weight) if type(base) is nn.Linear else (down.weight, up.weight)
    if any(type(weight) not in (nn.Parameter, Tensor) for weight in weights) or cast(Any, down).bias is not None:
        return "its weights are of another class, or A has a bias"
    if is_hooked(base) or is_hooked(down) or is_hooked(up) or is_hooked(dropout):
        return "its parts have hooks"
    if torch.compiler.is_compiling():
        return None  # torch.compile handles patched functions itself
    if all_are_hooked():
        return "there are hooks for all modules"
    if is_patched() or not is_of(PeftLinear.forward, peft_layer.__file__):
        return "a forward of PyTorch's or PEFT's was replaced"
    return None


@cache
def _warn_sharded_alone() -> None:
    """Warn once that layers run PEFT's forward, because FSDP gathers a weight only while its own module runs."""
    logger.warning(
        "FSDP shards linear layers inside LoRA layers separately, so those run PEFT's own forward. "
        "Wrap complete decoder layers to use the fused forward."
    )


def _evaluates_quantized(layer: nn.Module) -> bool:
    return not torch.is_grad_enabled() and not is_hooked(layer) and not all_are_hooked() and is_quantized(layer)


def _is_plain_base(layer: nn.Module) -> bool:
    """Return whether a layer's weight can be read at any time. FSDP's modules have classes of their own."""
    return type(layer) is nn.Linear or (is_quantized(layer) and not isinstance(layer, FSDPModule))


class FastLinear(FastForward, PeftLinear):  # type: ignore[misc]
    """PEFT's LoRA layer of a `torch.nn.Linear`, computed as one autograd node if it is plain.

    Layers that are not plain (`not_plain`) run PEFT's own forward. `optimize` sets the class of existing layers and
    changes nothing else about them, so state dicts, saving and PEFT's methods stay the same. The class has the name of
    PEFT's, in `print(model)` and for tools.
    """


FAST: dict[type[nn.Module], type[nn.Module]] = {PeftLinear: FastLinear}
"""PEFT's LoRA layers and the classes that replace them."""


if is_bnb_4bit_available():
    from peft.tuners.lora import Linear4bit, Linear8bitLt

    class FastLinear4bit(FastForward, Linear4bit):  # type: ignore[misc]
        """`FastLinear` over bitsandbytes' 4-bit layer."""

    class FastLinear8bitLt(FastForward, Linear8bitLt):  # type: ignore[misc]
        """`FastLinear` over bitsandbytes' 8-bit layer; activations are not rounded to 8 bits."""

    FAST |= {Linear4bit: FastLinear4bit, Linear8bitLt: FastLinear8bitLt}


for _plain, _fast in FAST.items():
    _fast.__name__ = _plain.__name__  # pickle and `repr` of the class go by the qualified name, which stays


def optimize(model: nn.Module, recomputation: Literal["none", "elementwise"] | None = None) -> nn.Module:
    """Use the fast paths in an existing model, in place.

    Replaces, by changing classes and registered functions:

    - PEFT's LoRA layers over a `torch.nn.Linear` or a quantised layer of bitsandbytes by `FastLinear` and its variants;
    - transformers' `sdpa` attention by one that computes the documents of a packed row separately;
    - Phi-3's attention and feed-forward modules and the family's RMSNorm by those of `kernels.modules`;
    - LongRoPE's choice of factors, which is then made for every document (`kernels.rotary`);
    - on a GPU, the layers of packed training batches by one autograd node per layer (`decoder_stack`).

    Quantised weights keep their layout (`quantization.keep_layout`). Calling it again changes nothing, and a model
    without such parts stays as it is. In one of philora's runs on a CPU the process keeps freed memory, or returns
    large blocks if products over a quantised base allocate matrices (`kernels.memory`).

    Args:
        model: A PeftModel, or any model; packed rows are recognised by `position_ids` that start again.
        recomputation: "elementwise": backward computes the outputs of RMSNorm and SwiGLU and dropout's masks again
            instead of keeping them; losses and gradients have the same bits. "none": they are kept. None: no change
            (the default of a model is "none"). `model.gradient_checkpointing_enable()` recomputes complete layers.

    Returns:
        The same model.

    Raises:
        ConfigError: `recomputation` has another value.
    """
    if recomputation not in (None, "none", "elementwise"):
        todo = "model.gradient_checkpointing_enable() recomputes complete layers"
        raise ConfigError(fault("optimize", "recomputation", recomputation, "none or elementwise", todo))
    for module in model.modules():
        fast = FAST.get(type(module))
        if fast is not None and _is_plain_base(cast(LoraLayer, module).base_layer):
            module.__class__ = fast
    keep_layout(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if (
        isinstance(base, PreTrainedModel)
        and base.config.model_type in attention.MODEL_TYPES
        and base.config._attn_implementation == "sdpa"
    ):
        attention.register()
        base.set_attn_implementation(attention.NAME)
    use_fast_modules(model)
    use_decoder_stack(model)
    use_document_rotary(model)
    if recomputation is not None:
        _set_recomputation(model, recomputation == "elementwise")
    if all(parameter.device.type == "cpu" for parameter in model.parameters()):
        allocates = any(is_quantized(module) and not shares_memory(module) for module in model.modules())
        return_large_blocks() if allocates else keep_freed_memory()
    return model


def _set_recomputation(model: nn.Module, on: bool) -> None:
    """Switch recomputation of the fast modules and layers on or off; warn of parts that it does not cover."""
    parts = recompute_elementwise(model, on)
    kept = 0
    for layer in model.modules():
        if isinstance(layer, FastForward):
            layer.recomputes = on
        kept += isinstance(layer, LoraLayer) and not (isinstance(layer, FastForward) and layer.plain_adapter())
    if not on:
        return
    todo = "gradient_checkpointing=True (full) recomputes complete layers of any model"
    if not fused_enabled():
        logger.warning(
            "element-wise recomputation belongs to the fused path, which is off: nothing is recomputed. %s.", todo
        )
    elif not parts:
        logger.warning("element-wise recomputation: no RMSNorm or SwiGLU of this model has a fast form. %s.", todo)
    elif "SwiGLU" not in parts:
        logger.warning("element-wise recomputation covers only %s of this model. %s.", " and ".join(parts), todo)
    if kept and fused_enabled():
        logger.warning("element-wise recomputation: %d LoRA layers run PEFT's forward and keep their inputs", kept)
