"""Replace torch's layers in a model by LoRA layers, so that a saved state can be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from philora.errors import ConfigError, fault, nearest, one_per_line
from philora.lora.layers import Embedding, Linear, MergedLinear


def replace_layers(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Replace named modules by LoRA layers that share their weight and bias.

    Args:
        model: Any module; changed in place.
        layers: Arguments of the LoRA layer (`r`, `lora_alpha`, ...) by the full name of an `nn.Linear`, an
            `nn.Embedding` or a GPT-2 `Conv1D`, whose weight is (in, out). With `enable_lora` the layer is a
            `MergedLinear`.

    Returns:
        The replaced modules by name; `setattr` restores them.

    Raises:
        ConfigError: A module does not exist or cannot be replaced, or its arguments are wrong. All faults are reported
            at once, and the model is unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        >>> before = replace_layers(model, {"0": {"r": 2, "enable_lora": [True, False]}})
        >>> type(model[0]).__name__, model[0].weight is before["0"].weight
        ('MergedLinear', True)
    """
    modules = dict(model.named_modules())
    made: dict[str, nn.Module] = {}
    faults = []
    for name, arguments in layers.items():
        where = "philora.lora.replace_layers"
        if name not in modules:
            faults.append(fault(where, "layers", name, "the name of a module", nearest(name, modules)))
            continue
        try:
            made[name] = _layer_like(modules[name], dict(arguments))
        except (TypeError, ValueError) as error:
            faults.append(fault(where, name, dict(arguments), f"arguments of its LoRA layer: {error}"))
    if faults:
        raise ConfigError(one_per_line(faults))
    for name, layer in made.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    return {name: modules[name] for name in made}


def _layer_like(module: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    """Return a LoRA layer with the module's own weight and bias, without allocating another weight."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    conv1d = type(module).__name__ == "Conv1D"  # transformers' class, which this package does not import
    if not isinstance(weight, nn.Parameter) or not (conv1d or isinstance(module, nn.Linear | nn.Embedding)):
        raise TypeError(f"a {type(module).__name__} is neither a linear layer nor an embedding")
    meta: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    layer: Embedding | Linear | MergedLinear
    if isinstance(module, nn.Embedding):
        names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        settings: dict[str, Any] = {name: getattr(module, name) for name in names}
        layer = Embedding(module.num_embeddings, module.embedding_dim, **arguments, **settings, **meta)
    else:
        rows, columns = weight.shape[::-1] if conv1d else weight.shape
        kind = MergedLinear if "enable_lora" in arguments else Linear
        layer = kind(columns, rows, bias=bias is not None, fan_in_fan_out=conv1d, **arguments, **meta)
        layer.register_parameter("bias", bias)
    layer.weight = weight
    if hasattr(layer, "lora_A"):
        weight.requires_grad_(False)
        for name in ("lora_A", "lora_B"):
            setattr(layer, name, nn.Parameter(torch.empty_like(getattr(layer, name), device=weight.device)))
        layer._reset_lora()
    return layer.train(module.training)
