"""Complete embeddings in an adapter's file: they belong to the adapter, and the base keeps its own.

PEFT saves them on request (`save_embedding_layers=True`). When it loads such a file, it overwrites the base's. Here
they are kept beside the base's, as PEFT does with `modules_to_save`. So the base without the adapter computes with its
own embeddings, every copy or merge of the adapter has them, and several adapters can have different ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from philora.errors import AdapterError, fault, one_per_line

_PREFIX = "base_model.model."


class OwnEmbedding(ModulesToSaveWrapper):  # type: ignore[misc]
    """An embedding of the base with those of adapters beside it. They are used, but do not train."""

    def _freeze(self) -> None:
        for parameter in self.modules_to_save.parameters():
            parameter.requires_grad_(False)

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Update as PEFT does, and freeze the weights."""
        super().update(adapter_name, **kwargs)
        self._freeze()

    def enable_adapters(self, enabled: bool) -> None:
        """Enable as PEFT does, and freeze the weights."""
        super().enable_adapters(enabled)
        self._freeze()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the adapter as PEFT does, without training it."""
        super().set_adapter(adapter_names, inference_mode=True)


class OwnWeights:
    """Complete weights in an adapter's file that differ from those of the base's embeddings.

    Attributes:
        own: Weights by the full name of their module in the base; tied modules have the same weight.
        under_lora: Names of modules for which this adapter, or one in the model, also has a LoRA update.
    """

    def __init__(self, base: nn.Module, config: PeftConfig, names: Iterable[str], folder: Path) -> None:
        """Read the weights that differ; `names` are those of the file's tensors.

        Raises:
            AdapterError: A weight has another shape than the base's.
        """
        self.own: dict[str, Tensor] = {}
        self.under_lora: list[str] = []
        saved = tuple(getattr(config, "modules_to_save", None) or ())
        keys = {}
        for key in names:
            module = key.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".base_layer")
            if key.endswith(".weight") and "lora_" not in key and not module.endswith(saved):
                keys[module] = key
        embeddings = _embeddings(base)
        updated = {key.removeprefix(_PREFIX).partition(".lora_")[0] for key in names if ".lora_" in key}
        faults = []
        values: dict[str, Tensor] = {}
        for name, weight in embeddings.items():
            if name not in keys or weight.is_meta:
                continue
            with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
                values[name] = file.get_tensor(keys[name]).to(weight.dtype)
            shape = tuple(values[name].shape)
            if shape != tuple(weight.shape):
                todo = "Give the base whose vocabulary was extended, or extend it: model.resize_token_embeddings"
                faults.append(fault(str(folder), keys[name], shape, f"shape {tuple(weight.shape)}", todo))
        if faults:
            raise AdapterError(one_per_line(faults))
        if values and getattr(getattr(base, "config", None), "tie_word_embeddings", False):
            values = dict.fromkeys(embeddings, list(values.values())[-1])  # PEFT loads them one after another into one
        for name, value in values.items():
            if torch.equal(value, embeddings[name].detach().cpu()):
                continue
            if updated.intersection(values) or isinstance(_plain(base).get_submodule(name), BaseTunerLayer):
                self.under_lora.append(name)
            else:
                self.own[name] = value

    def copies(self, base: nn.Module) -> dict[str, Tensor]:
        """Return copies of the base's own weights, which PEFT overwrites."""
        return {name: embedding.detach().clone() for name, embedding in _embeddings(base).items() if name in self.own}

    def put(self, model: PeftModel, adapter_name: str, before: Mapping[str, Tensor]) -> None:
        """Restore the base's own weights, and give the adapter those of its file."""
        base = model.get_base_model()
        placed: dict[int, nn.Parameter] = {}
        for name, value in self.own.items():
            module = base.get_submodule(name)
            original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            original.weight.data.copy_(before[name])
            if isinstance(module, ModulesToSaveWrapper):
                module.update(adapter_name)
            else:
                module = OwnEmbedding(module, adapter_name)
                parent, _, leaf = name.rpartition(".")
                setattr(base.get_submodule(parent), leaf, module)
            if adapter_name in model.active_adapters:
                module.set_adapter(adapter_name, inference_mode=True)
            else:
                active = [name for name in model.active_adapters if name in module.modules_to_save]
                module.set_adapter(active[:1], inference_mode=True)
            if id(value) not in placed:
                placed[id(value)] = nn.Parameter(value.to(original.weight.device), requires_grad=False)
            module.modules_to_save[adapter_name].weight = placed[id(value)]
        config = model.peft_config[adapter_name]
        if self.own:
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *self.own})


def _plain(model: nn.Module) -> nn.Module:
    return cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model


def _embeddings(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's own weights of input and output embeddings, by the full name of their module."""
    base = _plain(model)
    if not isinstance(base, PreTrainedModel):
        return {}
    own = [entry for entry in (base.get_input_embeddings(), base.get_output_embeddings()) if entry is not None]
    found: dict[str, Tensor] = {}
    for name, module in base.named_modules():
        if any(module is entry for entry in own):
            inner = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            inner = inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner
            found[name] = inner.weight
    return found


def stay_tied(model: PeftModel) -> bool:
    """Return whether the active adapter has one weight of its own for both input and output embeddings."""
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        return False
    weights = [
        entry.modules_to_save[entry.active_adapters[0]].weight
        for entry in (base.get_input_embeddings(), base.get_output_embeddings())
        if isinstance(entry, OwnEmbedding) and entry.active_adapters
    ]
    return len(weights) == 2 and weights[0] is weights[1]
