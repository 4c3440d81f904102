"""Choose which parameters train, and save and load LoRA's tensors.

Names are matched by words, where loralib matches substrings. A parameter is LoRA's if its own name begins with `lora_`
(`lora_A` of the layers here) or it is in a module called `lora_A` or `lora_B` (PEFT's layers). It is a bias if `bias`
is a word of its own name. So a head called `lora_head` stays frozen, and `debias.weight` is no bias.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from philora.errors import AdapterError, ConfigError, fault, nearest, one_per_line
from philora.lora.base import AdaptedLayer
from philora.lora.layers import ConvLoRA, Embedding

_BIAS_CHOICES = ("none", "all", "lora_only")
_PEFT_MODULES = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}


def _is_lora(name: str) -> bool:
    *modules, own = name.split(".")
    return own.startswith("lora_") or not _PEFT_MODULES.isdisjoint(modules)


def _is_bias(name: str) -> bool:
    return re.search(r"(^|_)bias(_|$)", name.rpartition(".")[2]) is not None


def _biases_of_lora_layers(model: nn.Module) -> set[str]:
    """Return the names of biases of layers that have an update."""
    names = set()
    for prefix, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if any(name.startswith("lora_") for name in own):
            bias = "conv.bias" if isinstance(module, ConvLoRA) else "bias"
            names.add(f"{prefix}.{bias}" if prefix else bias)
    return names


def _chosen(model: nn.Module, names: list[str], bias: str, where: str) -> set[str]:
    """Return LoRA's own names and the biases that are chosen."""
    if bias not in _BIAS_CHOICES:
        raise ConfigError(
            fault(where, "bias", bias, "one of " + ", ".join(_BIAS_CHOICES), nearest(str(bias), _BIAS_CHOICES))
        )
    lora = {name for name in names if _is_lora(name)}
    if bias == "all":
        return lora | {name for name in names if _is_bias(name)}
    if bias == "lora_only":
        return lora | _biases_of_lora_layers(model).intersection(names)
    return lora


def mark_only_lora_as_trainable(model: nn.Module, bias: str = "none") -> None:
    """Make LoRA's parameters and the chosen biases trainable, and freeze all others.

    Args:
        model: Any module.
        bias: `none`; `all` biases of the model; `lora_only`: those of layers that have an update.

    Raises:
        ConfigError: `bias` has another value. Nothing has been changed.

    Source:
        loralib 0.1.2, which matches substrings and never makes a parameter trainable again.
    """
    # A parameter with several names (tied) trains if one of them is chosen.
    named = list(model.named_parameters(remove_duplicate=False))
    chosen = _chosen(model, [name for name, _ in named], bias, "philora.lora.mark_only_lora_as_trainable")
    trainable = {id(parameter) for name, parameter in named if name in chosen}
    for _, parameter in named:
        parameter.requires_grad = id(parameter) in trainable


def lora_state_dict(model: nn.Module, bias: str = "none") -> dict[str, Tensor]:
    """Return LoRA's part of the state dict and the chosen biases: the result of a fine-tuning.

    Args:
        model: Any module, in any mode.
        bias: The value that `mark_only_lora_as_trainable` was called with.

    Raises:
        ConfigError: `bias` is none of `none`, `all`, `lora_only`.

    Source:
        loralib 0.1.2.
    """
    state = model.state_dict()
    chosen = _chosen(model, list(state), bias, "philora.lora.lora_state_dict")
    return {name: value for name, value in state.items() if name in chosen}


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the same model without LoRA, which torch's own layers can load.

    Weights are merged, and A and B left out. In loralib this is the state dict of a model in eval mode. The model is
    not changed.

    Numerics:
        Computed in fp32 and rounded once to every weight's dtype.

    Cost:
        A copy of every adapted weight.
    """
    state = dict(model.state_dict())
    for prefix, module in model.named_modules():
        if not isinstance(module, AdaptedLayer):
            continue
        path = f"{prefix}." if prefix else ""
        if isinstance(module, ConvLoRA):
            state = {
                name.replace(f"{path}conv.", path, 1) if name.startswith(f"{path}conv.") else name: value
                for name, value in state.items()
            }
        if module._has_update:
            merged = _computed(path)
            state = {name: value for name, value in state.items() if not merged.match(name)}
            state[f"{path}weight"] = module.merged_weight()
    return state


def _computed(path: str) -> re.Pattern[str]:
    """Return a pattern for the names of a layer's weight and update, also if PyTorch's utilities compute them."""
    of = r"(weight|lora_A|lora_B)"
    return re.compile(rf"{re.escape(path)}(parametrizations\.{of}\..*|{of}(_orig|_mask|_g|_v|_u)?)$")


def load_lora(model: nn.Module, source: str | Path | Mapping[str, Any]) -> None:
    """Load LoRA's tensors, and all other tensors of the model that the source holds.

    Args:
        model: A module with LoRA layers, in any mode; a merged model is merged again afterwards.
        source: A state dict, a `.safetensors` file, or a file of `torch.save`, read with `weights_only=True`.

    Raises:
        AdapterError: The file is missing, damaged or holds code; or tensors are missing, unexpected or of a wrong
            shape. All faults are reported at once, and nothing has been loaded.
    """
    where = "philora.lora.load_lora" if isinstance(source, Mapping) else str(source)
    state = dict(source if isinstance(source, Mapping) else read_state(source))
    expected = model.state_dict()
    _name_convolutions(model, state)
    faults = [
        fault(where, name, "missing", f"a tensor of shape {tuple(expected[name].shape)}")
        for name in expected
        if _is_lora(name) and name not in state
    ]
    for name, value in state.items():
        if name not in expected:
            faults.append(fault(where, name, "unexpected", "a name of this model", nearest(str(name), expected)))
        elif not isinstance(value, Tensor):
            faults.append(fault(where, name, value, f"a tensor, found {type(value).__name__}"))
        elif value.shape != expected[name].shape:
            faults.append(fault(where, name, tuple(value.shape), f"shape {tuple(expected[name].shape)}"))
    if faults:
        raise AdapterError(one_per_line(faults))
    model.load_state_dict(state, strict=False)


def _name_convolutions(model: nn.Module, state: dict[str, Any]) -> None:
    """Rename `weight` and `bias` of convolutions, as some releases of loralib write them, to our names."""
    for prefix, module in model.named_modules():
        if isinstance(module, ConvLoRA):
            path = f"{prefix}." if prefix else ""
            for name in ("weight", "bias"):
                if path + name in state:
                    state.setdefault(f"{path}conv.{name}", state.pop(path + name))


def read_state(path: str | Path) -> dict[str, Any]:
    """Return the tensors of a `.safetensors` file or of a file of `torch.save`, on the CPU.

    Raises:
        AdapterError: The file is missing, is damaged, holds code or holds no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise AdapterError(fault(str(path), "path", str(path), "an existing file"))
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            # Read into memory, so that overwriting the file later does not change the tensors.
            state: Any = load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # A damaged or malicious file can cause any error: EOFError, KeyError, UnicodeDecodeError, ...
        code = re.search(r"Unsupported (?:global|class|operand).*|GLOBAL \S+", str(error))
        value = code.group() if code else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        expected = "a complete file of tensors without code"
        raise AdapterError(fault(str(path), "content", value, expected, "Save the state dict again")) from error
    if not isinstance(state, dict):
        raise AdapterError(fault(str(path), "content", type(state).__name__, "a state dict"))
    return state


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Disable the model's LoRA layers in this block, so that they compute their base.

    Example:
        >>> from philora import lora
        >>> layer = lora.Linear(2, 2, r=1)
        >>> with lora.disable_adapter(layer):
        ...     assert layer.disable_adapters
    """
    layers = [module for module in model.modules() if isinstance(module, AdaptedLayer) and not module.disable_adapters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def loraplus_fast_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that LoRA+ gives the higher learning rate: B of all layers but embeddings.

    The paper's argument is about an A that starts normal and a B that starts at zero. In an embedding it is the other
    way round, so there neither learns faster. PEFT's embedding layers name theirs `lora_embedding_B`.

    Args:
        model: A module with its trainable parameters chosen: layers of this package or PEFT's, also inside the wrappers
            of DDP, FSDP and torch.compile, which add words to the names.

    Source:
        Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models" (2024), section 4.
    """
    embeddings = {id(module.lora_B) for module in model.modules() if isinstance(module, Embedding) and module.r}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "lora_B" in name.split(".") and id(parameter) not in embeddings
    }


def loraplus_parameter_groups(
    model: nn.Module, lr: float, loraplus_lr_ratio: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return an optimizer's groups in which B learns faster than all other parameters.

    Args:
        model: A module with its trainable parameters chosen.
        lr: Learning rate of A and of all parameters that are not LoRA's.
        loraplus_lr_ratio: B's learning rate is `lr` times this; the paper recommends 16 and more.
        weight_decay: Weight decay of both groups.

    Returns:
        The slow group, then the fast one, without empty groups.

    Raises:
        ConfigError: `loraplus_lr_ratio` is not positive, or nothing trains.

    Source:
        Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models" (2024), section 4.
    """
    where = "philora.lora.loraplus_parameter_groups"
    if not loraplus_lr_ratio > 0:
        raise ConfigError(fault(where, "loraplus_lr_ratio", loraplus_lr_ratio, "a number above 0"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        todo = "Call mark_only_lora_as_trainable first"
        raise ConfigError(fault(where, "model", type(model).__name__, "at least one trainable parameter", todo))
    fast = list(loraplus_fast_parameters(model).values())
    chosen = {id(parameter) for parameter in fast}
    slow = [parameter for parameter in trained if id(parameter) not in chosen]
    groups = [(slow, lr), (fast, lr * loraplus_lr_ratio)]
    return [{"params": params, "lr": rate, "weight_decay": weight_decay} for params, rate in groups if params]


def split_loraplus_groups(
    optimizer: torch.optim.Optimizer, fast: Mapping[str, nn.Parameter], loraplus_lr_ratio: float
) -> None:
    """Move B into separate groups of an existing optimizer, before its first step.

    The B of a group are moved to a new group at the end, with the same settings and `loraplus_lr_ratio` times the
    learning rate. So weight decay does not change, the first group is still the slow one, and a scheduler that is made
    afterwards scales both rates alike.

    Args:
        optimizer: An optimizer without state.
        fast: Parameters by name, from `loraplus_fast_parameters`.
        loraplus_lr_ratio: B's learning rate as a multiple of its group's.

    Raises:
        ConfigError: The optimizer lacks some of the parameters. It is unchanged.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in fast.items() if id(parameter) not in held]
    if missing:
        expected = f"every B in the groups of {type(optimizer).__name__}, which lacks {len(missing)} of {len(fast)}"
        todo = f"Choose another optimizer, or leave loraplus_lr_ratio out ({missing[0]} is one of them)"
        raise ConfigError(
            fault("philora.lora.split_loraplus_groups", "loraplus_lr_ratio", loraplus_lr_ratio, expected, todo)
        )
    chosen = {id(parameter) for parameter in fast.values()}
    new = []
    for group in optimizer.param_groups:
        moved = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            new.append({**group, "params": moved, "lr": group["lr"] * loraplus_lr_ratio})
    for group in new:
        optimizer.add_param_group(group)
