"""Read the facts that `choice.stack_for` needs from a model, a call and a device, without waiting for a device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import chain
from operator import attrgetter, is_
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.modules import module as nn_module

from philora.decoder_stack.choice import BatchFacts, DeviceFacts, ModelFacts
from philora.families import longrope_switch_tokens
from philora.kernels.attention import has_flash
from philora.kernels.memory import available_bytes
from philora.kernels.quantization import is_quantized, scheme_of
from philora.kernels.switches import stack_switch
from philora.lora.functional import autocast_dtype, fused_enabled
from philora.lora.hooks import GLOBAL_HOOKS, HOOKS, all_are_hooked

LINEARS = (("self_attn", "qkv_proj"), ("self_attn", "o_proj"), ("mlp", "gate_up_proj"), ("mlp", "down_proj"))
"""Paths of the linear layers of a decoder layer, in the order of computation."""
NORMS = ("input_layernorm", "post_attention_layernorm")

_RECORDING = "transformers.utils.output_capturing"
"""Module of transformers' hooks for output_hidden_states. Once requested they stay, and do nothing afterwards."""


def linears_of(layer: nn.Module) -> list[Any]:
    """Return the four linear layers of a decoder layer, or the LoRA layers around them."""
    return [getattr(getattr(layer, parent), name) for parent, name in LINEARS]


def norm_of(layer: nn.Module, name: str) -> Any:
    """Return a norm of a decoder layer, or the copy of it that an adapter trains."""
    norm = getattr(layer, name)
    if isinstance(norm, ModulesToSaveWrapper):
        active = norm.active_adapters
        if len(active) == 1 and not norm.disable_adapters and active[0] in norm.modules_to_save:
            return norm.modules_to_save[active[0]]
        return norm.original_module
    return norm


def base_of(linear: nn.Module) -> Any:
    """Return the linear layer itself, without the adapter around it."""
    return linear.base_layer if isinstance(linear, LoraLayer) else linear


def not_one_adapter(layer: Any) -> str | None:
    """Return why a LoRA layer does not have just one active adapter without variant (DoRA, ...) and bias, or None."""
    if layer.disable_adapters or layer.merged:
        return "its adapters are disabled or merged"
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    if active[0] in layer.lora_variant or layer.lora_bias.get(active[0]):
        return "it is a variant of LoRA, or B has a bias"
    return None


def active_adapter(layer: Any) -> str:
    """Return the name of the active adapter of a LoRA layer that has just one (`not_one_adapter`)."""
    name: str = next(adapter for adapter in layer.active_adapters if adapter in layer.lora_A)
    return name


def adapter_name_of(linear: Any) -> str | None:
    """Return the name of the one plain LoRA adapter of a linear layer, or None.

    It is plain if `not_one_adapter` returns None, A and B are linear layers without slices, and dropout is PyTorch's.
    """
    if not isinstance(linear, LoraLayer) or not_one_adapter(linear) is not None:
        return None
    name = active_adapter(linear)
    down, up = linear.lora_A[name], linear.lora_B[name]
    plain = type(down) is nn.Linear and type(up) is nn.Linear and not getattr(up, "slice_layout", None)
    return name if plain and isinstance(linear.lora_dropout[name], nn.Dropout | nn.Identity) else None


def facts_of_model(model: Any) -> ModelFacts:
    """Return the facts of a decoder (`Phi3Model` and its like), with or without weights.

    Cost:
        Visits all modules and parameters of the layers: 31 ms of CPU time for 32 layers, measured on two busy cores.
        `known_facts` does it once.
    """
    config = model.config
    architecture = next((item.__name__ for item in type(model).__mro__ if item.__name__.endswith("Model")), "")
    if architecture == "StackedPhi3Model":
        architecture = "Phi3Model"
    if architecture != "Phi3Model":
        return ModelFacts(architecture=type(model).__name__)
    layers = list(model.layers)[: config.num_hidden_layers]
    linears = [item for layer in layers for item in linears_of(layer)]
    norms = [norm_of(layer, name) for layer in layers for name in NORMS]
    adapted = [linear for linear in linears if isinstance(linear, LoraLayer)]
    dropouts = [drop.p for item in adapted for drop in item.lora_dropout.values() if isinstance(drop, nn.Dropout)]
    heads = config.num_attention_heads
    return ModelFacts(
        architecture=architecture,
        dtype=_dtype(model, linears, norms),
        base=_base(model, linears),
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        activation=str(config.hidden_act),
        attention_dropout=float(config.attention_dropout),
        residual_dropout=float(config.resid_pdrop),
        lora_dropout=max(dropouts, default=0.0),
        adapters=tuple(dict.fromkeys(_adapter_reasons(linears))),
        hooks=tuple(_hooked(layers)),
        trains_base=tuple(_trains_base(layers, linears, norms)),
        trains_norms=any(norm.weight.requires_grad for norm in norms),
        unadapted=len(adapted) < len(linears),
        longrope=longrope_switch_tokens(config) is not None,
        sharded=any(isinstance(item, FSDPModule | FullyShardedDataParallel) for item in (model, *layers))
        or any(hasattr(parameter, "ds_id") for parameter in layers[0].parameters()),  # DeepSpeed's ZeRO-3
        devices=len({base_of(linear).weight.device for linear in linears}),
    )


def _dtype(model: Any, linears: list[Any], norms: list[Any]) -> str:
    """Return the dtype of all products; "mixed" if activations would change their dtype between layers."""
    embedding = model.embed_tokens
    embedding = embedding.original_module if isinstance(embedding, ModulesToSaveWrapper) else embedding
    own = getattr(embedding, "base_layer", embedding).weight.dtype
    found = {own}
    for linear in map(base_of, linears):
        quantized = is_quantized(linear)
        found.add((getattr(linear, "compute_dtype", None) or own) if quantized else linear.weight.dtype)
    found |= {norm.weight.dtype for norm in norms if not norm.weight.requires_grad}
    return str(own).removeprefix("torch.") if len(found) == 1 else "mixed"


def _base(model: Any, linears: list[Any]) -> str:
    kinds = {is_quantized(base_of(linear)) for linear in linears}
    if kinds == {False}:
        return "plain"
    return (scheme_of(model.config) or "mixed") if kinds == {True} else "mixed"


def _adapter_reasons(linears: list[Any]) -> Iterator[str]:
    """Yield the reasons why PEFT's or philora's layers have to compute an adapter themselves."""
    names: set[str] = set()
    for linear in linears:
        if isinstance(linear, LoraLayer):
            yield from _reasons_of_one(linear)
            names.update(name for name in linear.active_adapters if name in linear.lora_A)
        elif not isinstance(linear, nn.Linear):
            yield f"{type(linear).__name__} is no LoRA layer of a linear layer"
        if getattr(base_of(linear), "bias", None) is not None:
            yield "a linear layer has a bias"
    if len(names) > 1:
        yield f"several adapters are active: {', '.join(sorted(names))}"
    if not any(isinstance(linear, LoraLayer) for linear in linears):
        yield "there is no adapter"


def _reasons_of_one(layer: Any) -> list[str]:
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if layer.disable_adapters or layer.merged:
        return ["adapters are off" if layer.disable_adapters else "adapters are merged"]
    if len(active) > 1:
        return [f"several adapters are active: {', '.join(sorted(active))}"]
    found = []
    for name in active:
        if name in layer.lora_variant:
            found.append(f"a variant of LoRA ({type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')})")
        if layer.lora_bias.get(name):
            found.append("B has a bias")
        if getattr(layer.lora_B[name], "slice_layout", None):
            found.append("slices of fused projections have separate adapters")
        if not found and adapter_name_of(layer) is None:
            found.append("an adapter whose A, B or dropout is not one of PyTorch's layers")
    return found


def only_moves(hook: Any) -> bool:
    """Return whether a hook of accelerate's only moves inputs to a module's device, as the stack does itself."""
    return type(hook) is AlignDevicesHook and not hook.offload


def _hooked(layers: list[nn.Module]) -> Iterator[str]:
    if all_are_hooked():
        yield "every module (a global hook)"
    for layer in layers:
        for module in layer.modules():
            state = module.__dict__
            hooks = state["_forward_hooks"].values()
            if (
                any(getattr(hook, "__module__", "") != _RECORDING for hook in hooks)
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
                or ("forward" in state and not only_moves(state.get("_hf_hook")))
            ):
                yield type(module).__name__


def _trains_base(layers: list[nn.Module], linears: list[Any], norms: list[Any]) -> Iterator[str]:
    covered = {id(norm.weight) for norm in norms}
    for linear in linears:
        if isinstance(linear, LoraLayer) and (name := adapter_name_of(linear)) is not None:
            covered |= {id(linear.lora_A[name].weight), id(linear.lora_B[name].weight)}
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and id(parameter) not in covered and ".lora_" not in name:
                yield name


class _Watch:
    """Detect changes of all that the facts of a model were read from.

    Modules, parameters and hooks are compared by identity, and values that can change in place by equality, in lists
    that are made once.
    """

    def __init__(self, model: Any) -> None:
        modules = [model, *(item for layer in model.layers for item in layer.modules())]
        self._model, self._modules = ref(model), modules[1:]  # what holds a model here would keep it for ever
        self._states = [item.__dict__ for item in modules]
        self._hooks = [state[name] for state in self._states for name in HOOKS]
        self._children = [state["_modules"] for state in self._states]
        self._parameters = [state["_parameters"] for state in self._states]
        self._adapted = [item for item in modules if isinstance(item, LoraLayer)]
        self._wrappers = [item for item in modules if isinstance(item, BaseTunerLayer | ModulesToSaveWrapper)]
        self._dropouts = [item for item in modules if isinstance(item, nn.Dropout)]
        self._config = model.config
        self._embedding = model.embed_tokens
        self._objects, self._values = self._look()

    def _look(self) -> tuple[list[Any], list[Any]]:
        """Return the objects that must stay identical, and the values that must stay equal."""
        held = chain.from_iterable(map(dict.values, self._parameters))
        parameters = [parameter for parameter in held if parameter is not None]
        objects = [
            *chain.from_iterable(map(dict.values, self._children)),
            *parameters,
            type(self._model()),
            *map(type, self._modules),
        ]
        values = [
            list(map(len, self._states)),
            list(map(len, self._hooks)),
            [parameter.requires_grad for parameter in parameters],
            [parameter.dtype for parameter in parameters],
            [parameter.device for parameter in parameters],
            [wrapper._disable_adapters for wrapper in self._wrappers],
            [active if isinstance(active, str) else list(active) for active in map(_active, self._wrappers)],
            [len(item.merged_adapters) for item in self._adapted],
            [value for item in self._adapted for value in item.scaling.values()],
            [dropout.p for dropout in self._dropouts],
            [len(getattr(nn_module, name)) for name in GLOBAL_HOOKS],
            [getattr(self._config, name, None) for name in _CONFIG],
            [parameter.dtype for parameter in self._embedding.parameters()],
        ]
        return objects, values

    def changed(self) -> bool:
        objects, values = self._look()
        same = len(objects) == len(self._objects) and all(map(is_, objects, self._objects))
        return not same or values != self._values


_active = attrgetter("_active_adapter")
_CONFIG = (
    "num_hidden_layers", "num_attention_heads", "hidden_size", "head_dim", "hidden_act", "attention_dropout",
    "resid_pdrop", "sliding_window",
)  # fmt: skip

_facts: WeakKeyDictionary[nn.Module, tuple[_Watch, ModelFacts]] = WeakKeyDictionary()


def known_facts(model: Any) -> ModelFacts:
    """Return `facts_of_model`, cached until the model changes; the same object is returned until then."""
    known = _facts.get(model)
    if known is None or known[0].changed():
        known = _facts[model] = _Watch(model), facts_of_model(model)
    return known[1]


def facts_of_call(model: nn.Module, inputs: Mapping[str, Any], keep: str) -> BatchFacts:
    """Return the facts of a call of a decoder with these keyword arguments."""
    config: Any = model.config
    use_cache = inputs.get("use_cache")
    use_cache = config.use_cache if use_cache is None else use_cache
    asked = tuple(
        name
        for name in ("output_hidden_states", "output_attentions")
        if (inputs[name] if inputs.get(name) is not None else getattr(config, name, False))
    )
    tuples = ("return_dict=False",) if inputs.get("return_dict", True) is False else ()
    given = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    autocast = None if given is None else autocast_dtype(given.device.type)
    return BatchFacts(
        gradients=torch.is_grad_enabled(),
        training=model.training,
        mask=inputs.get("attention_mask") is not None,
        positions=isinstance(inputs.get("position_ids"), Tensor),
        cache=bool(use_cache) or inputs.get("past_key_values") is not None,
        outputs=asked + tuples,
        autocast=None if autocast is None else str(autocast).removeprefix("torch."),
        keep=keep,
    )


def facts_of_device(device: torch.device | None = None) -> DeviceFacts:
    """Return the facts of a device; default: the first GPU if there is one, else the CPU."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = {"switch": stack_switch(), "fused": fused_enabled(), "triton": triton_version()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return DeviceFacts(
            kind="cuda",
            name=properties.name,
            capability=(properties.major, properties.minor),
            memory_bytes=properties.total_memory,
            flash=has_flash(),
            **settings,
        )
    return DeviceFacts(
        kind=device.type,
        name="a CPU" if device.type == "cpu" else device.type,
        capability=None,
        memory_bytes=available_bytes("cpu") if device.type == "cpu" else 0,
        interpreted=os.environ.get("TRITON_INTERPRET") == "1" and settings["switch"] == "all",
        flash=False,
        problem=_unusable_gpu(),
        **settings,
    )


@cache
def triton_version() -> str | None:
    """Return the version of Triton without importing it, or None if it is not installed."""
    if find_spec("triton") is None:
        return None
    try:
        return version("triton")
    except PackageNotFoundError:  # AMD's and Intel's builds of PyTorch have it under another name
        return "of unknown version"


def _unusable_gpu() -> str | None:
    """Return why a GPU cannot be used, in PyTorch's own words; None if it can, or if there is none.

    PyTorch's wheel on PyPI is built for CUDA, so a laptop without an NVIDIA driver is no problem to report.
    """
    if torch.version.cuda is None or torch.cuda.is_available():
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        return None if "Found no NVIDIA driver" in reason else reason
    return None
