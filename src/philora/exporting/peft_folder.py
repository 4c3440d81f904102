"""Read and write adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from philora.adapters.adapter_files import RECORD_NAME, slice_record
from philora.adapters.peft_models import load_adapter
from philora.adapters.slices import lora_layers
from philora.adapters.targets import Names
from philora.errors import AdapterError, fault, one_per_line
from philora.exporting.adapter import Adapter, Update, plain_number
from philora.exporting.merging import CHANGES_BASE
from philora.files.checkpoint import read_peft_tensors, write_json

_PREFIX = "base_model.model."

# Settings of a LoraConfig under which an update is not `scaling * B A` added to the base as it is.
_NOT_PLAIN = (
    "use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "layer_replication",
)  # fmt: skip


def _check_plain(folder: Path) -> None:
    config = peft.PeftConfig.from_pretrained(str(folder))
    where = str(folder / "adapter_config.json")
    todo = "Merge it instead: philora merge"
    faults = []
    if not isinstance(config, LoraConfig):
        raise AdapterError(fault(where, "peft_type", str(config.peft_type), "LORA", todo))
    for name in _NOT_PLAIN:
        if getattr(config, name, None):
            faults.append(fault(where, name, getattr(config, name), "plain LoRA, which every layout supports", todo))
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith((*CHANGES_BASE, "lora_ga")):
        todo = "Convert it first: save_pretrained(path_initial_model_for_weight_conversion=...)"
        faults.append(fault(where, "init_lora_weights", init, "an initialisation that leaves the base as it is", todo))
    if faults:
        raise AdapterError(one_per_line(faults))


def _of_peft(model: PeftModel, dtype: torch.dtype) -> Adapter:
    """Return the updates of a PeftModel's adapter `default`, in the dtype of their file (PEFT loads them wider)."""
    updates = {}
    for name, layer in lora_layers(model).items():
        if "default" in layer.lora_A:
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        else:
            down, up = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        if down.ndim != 2:
            expected = "linear layers and embeddings only"
            raise AdapterError(fault("export", name, type(layer).__name__, expected, "Merge it: philora merge"))
        slices = getattr(layer, "slices", {}).get("default", ())
        embedding = "default" not in layer.lora_A
        scaling = float(layer.scaling["default"])
        updates[name] = Update(_copy(down, dtype), _copy(up, dtype), scaling, slices, embedding)
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = {name.removeprefix(_PREFIX): value.detach().clone() for name, value in saved.items() if "lora_" not in name}
    return Adapter(updates, whole, copy.deepcopy(cast(LoraConfig, model.peft_config["default"])))


def _copy(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, copy=True)


def read_peft(model: PreTrainedModel, folder: Path) -> tuple[PeftModel, Adapter]:
    """Load the adapter of a folder into its base, in place, and return its updates.

    Raises:
        AdapterError: A file is torn or does not fit the base, or the adapter is no plain LoRA.
    """
    _check_plain(folder)
    dtypes = {tensor.dtype for name, tensor in read_peft_tensors(folder).items() if "lora_" in name}
    adapted = load_adapter(model, folder)
    if adapted.changed_base:
        expected = "the base's own weights under LoRA"
        todo = "Merge it instead: philora merge"
        raise AdapterError(fault(str(folder), "embeddings", adapted.changed_base, expected, todo))
    return adapted, _of_peft(adapted, dtypes.pop() if len(dtypes) == 1 else torch.float32)


def write_peft(adapter: Adapter, model: PreTrainedModel, folder: Path, base: str) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and, of slices, `philora.json`.

    Raises:
        AdapterError: PEFT's format does not support a complete trained tensor.
    """
    names = Names.of(model)
    tensors: dict[str, Tensor] = {}
    for name, update in adapter.updates.items():
        down, up = ("lora_embedding_A", "lora_embedding_B") if update.embedding else ("lora_A.weight", "lora_B.weight")
        tensors[f"{_PREFIX}{name}.{down}"] = update.lora_A.contiguous()
        tensors[f"{_PREFIX}{name}.{up}"] = update.lora_B.contiguous()
    for name, value in adapter.whole.items():
        tensors[f"{_PREFIX}{name}"] = value.contiguous()
    config = copy.deepcopy(adapter.config)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.use_rslora = False
    config.init_lora_weights = True
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.target_modules = set(names.condensed(adapter.updates))
    config.fan_in_fan_out = any(type(names.modules[name]).__name__ == "Conv1D" for name in adapter.updates)
    saved = sorted({name.rpartition(".")[0] for name in adapter.whole if not name.endswith(".bias")})
    config.modules_to_save = saved or None
    biases = {name for name in adapter.whole if name.endswith(".bias") and name.rpartition(".")[0] not in saved}
    adapted = {f"{name}.bias" for name in adapter.updates}
    config.bias = "none" if not biases else "lora_only" if biases <= adapted else "all"
    ranks = {name: update.rank for name, update in adapter.updates.items()}
    # PEFT divides alpha by the rank again; a scaling of two is alpha = 2 r.
    alphas = {name: plain_number(update.scaling * update.rank) for name, update in adapter.updates.items()}
    config.r, config.rank_pattern = _with_pattern(ranks)
    config.lora_alpha, config.alpha_pattern = _with_pattern(alphas)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(folder))
    slices = {name: update.slices for name, update in adapter.updates.items() if update.slices and name in names.rows}
    write_json(folder / RECORD_NAME, slice_record(slices))


def _with_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most common value, and by name those that differ, condensed to the last part where possible."""
    common = Counter(values.values()).most_common(1)[0][0]
    by_leaf: dict[str, set[Any]] = {}
    for name, value in values.items():
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(value)
    pattern: dict[str, Any] = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        alike = len(by_leaf[leaf]) == 1
        if value != common:
            pattern[leaf if alike else name] = value
    return common, pattern
