"""Read and write `philora.json`, and check an adapter's files before they are loaded into a model."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from philora.adapters.slices import Slices, inside, lora_layers, ranked_by_zeros, slices_named
from philora.adapters.targets import Names, as_list, is_lora, resolve
from philora.errors import AdapterError, PhiloraError, fault, one_per_line
from philora.files.checkpoint import read_peft_tensors

logger = logging.getLogger(__name__)

RECORD_NAME = "philora.json"


def slice_record(slices: Mapping[str, Slices]) -> dict[str, Any]:
    """Return the slices for `philora.json`: names in the order of their blocks, and the rank of each."""
    return {
        "format": 1,
        "slices": {
            module: {"names": [part.name for part in parts], "r": parts[0].rank_stop - parts[0].rank_start}
            for module, parts in slices.items()
        },
    }


def sort_names(config: Path) -> None:
    """Sort the lists of names in `adapter_config.json`. PEFT writes them from sets, in an order that varies."""
    content = json.loads(config.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(content.get(key), list):
            content[key] = sorted(content[key], key=str)
    config.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")  # as PEFT writes it


def check_adapter(model: nn.Module, folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Check that a saved adapter fits a model, whose weights are not read; return its configuration and tensors.

    Raises:
        AdapterError, TargetError: As `load_adapter`.
    """
    tensors = read_peft_tensors(folder)
    with reading(folder):
        config = PeftConfig.from_pretrained(str(folder))
        if is_lora(config):
            check_harmless(config, folder)
            resolve(model, config, where=str(folder / "adapter_config.json"))
        _check_tensors(model, config, tensors, folder)
    return config, tensors


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Name the file in errors that PEFT raises while it reads a folder."""
    try:
        yield
    except (PhiloraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not folder.is_dir():  # a hub id, whose own errors tell more
            raise
        where = str(folder / "adapter_config.json")
        found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        expected = "an adapter that PEFT can put on this model"
        raise AdapterError(fault(where, "content", found, expected, "Was it changed by hand?")) from error


_MOST_LAYERS = 4096
_MOST_ITERATIONS = 1000


def check_harmless(config: LoraConfig, folder: Path) -> None:
    """Refuse values in a downloaded file that would import a module, multiply layers or match without end.

    Raises:
        AdapterError: There are such values; all are named at once.
    """
    where, faults = str(folder / "adapter_config.json"), []
    if config.megatron_config is not None:
        expected = "null, because PEFT would import the module that megatron_core names"
        faults.append(fault(where, "megatron_config", config.megatron_config, expected))
    layers = sum(max(0, int(stop) - int(start)) for start, stop in config.layer_replication or ())
    if layers > _MOST_LAYERS:
        faults.append(fault(where, "layer_replication", config.layer_replication, f"at most {_MOST_LAYERS} layers"))
    chosen = config.layers_to_transform
    if isinstance(chosen, (list, tuple)) and len(chosen) > _MOST_LAYERS:  # PEFT looks each module up in the list
        value = f"a list of {len(chosen):,} numbers"
        faults.append(fault(where, "layers_to_transform", value, f"at most {_MOST_LAYERS} layers"))
    iterations = re.fullmatch(r"pissa_niter_(\d+)", str(config.init_lora_weights))
    if iterations is not None and (len(iterations[1]) > 4 or int(iterations[1]) > _MOST_ITERATIONS):
        expected = f"at most {_MOST_ITERATIONS} iterations"
        faults.append(fault(where, "init_lora_weights", config.init_lora_weights, expected))
    for key, values in (("lora_alpha", {"": config.lora_alpha}), ("alpha_pattern", config.alpha_pattern or {})):
        for value in values.values():
            if isinstance(value, float) and not math.isfinite(value):
                faults.append(fault(where, key, value, "a finite number"))
    patterns = {
        "target_modules": [config.target_modules],
        "exclude_modules": [config.exclude_modules],
        "layers_pattern": as_list(config.layers_pattern),
        "rank_pattern": list(config.rank_pattern or ()),
        "alpha_pattern": list(config.alpha_pattern or ()),
    }
    for key, several in patterns.items():
        for pattern in several:
            if isinstance(pattern, str) and not is_quick(pattern):
                expected = "a regular expression without nested repeats, and with at most 4 unbounded ones"
                faults.append(fault(where, key, pattern, expected, "List the names of the modules"))
    if faults:
        raise AdapterError(one_per_line(faults))


def is_quick(pattern: str) -> bool:
    """Return whether Python's `re`, which backtracks, matches the pattern with names of modules quickly."""
    if len(pattern) > 10_000:
        return False
    simple = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)  # an escaped character or a class matches one character
    unbounded = len(re.findall(r"[*+]|\{\d*,\}", simple))
    repeated_group = re.search(r"\)(?:[*+]|\{)", simple)
    return unbounded <= 4 and repeated_group is None


def recorded_slices(folder: Path, names: Names) -> dict[str, Any] | None:
    """Return the slices in `philora.json`, checked against the model; None if there is no such file.

    Raises:
        AdapterError: The file is damaged or has impossible values.
    """
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        recorded = json.loads(path.read_text(encoding="utf-8")).get("slices", {})
        for module, entry in recorded.items():
            known = all(isinstance(name, str) and name in names.rows.get(module, {name: ()}) for name in entry["names"])
            if not (known and entry["names"] and isinstance(entry["names"], list) and 1 <= int(entry["r"]) < 2**31):
                raise ValueError(f"slices of {module}: {entry}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        expected = "slices of fused modules, as philora writes them"
        todo = "Copy it again; without it the slices are read from the zeros of B"
        raise AdapterError(fault(str(path), "content", f"{type(error).__name__}: {error}", expected, todo)) from error
    return cast("dict[str, Any]", recorded)


def _check_tensors(model: nn.Module, config: PeftConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Compare a file's tensors with those of the adapter on a copy of the model without weights."""
    if not isinstance(model, PreTrainedModel):
        return  # PEFT's own checks remain
    config = copy.deepcopy(config)
    config.base_model_name_or_path = None  # else PEFT warns if the base has moved since training
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
        adapted = peft.get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    faults = [
        fault(str(folder), "missing", name, "a tensor for every adapted module")
        for name in sorted(expected.keys() - tensors.keys())
    ]
    embeddings = tuple(f"{name}{layer}.weight" for name in ("embed_tokens", "lm_head") for layer in ("", ".base_layer"))
    for name in sorted(tensors.keys() - expected.keys()):
        # PEFT also saves complete embeddings that are targets; MonteCLoRA makes no samplers on the meta device.
        if not name.endswith(embeddings) and ".lora_monteclora_sampler." not in name:
            faults.append(fault(str(folder), "unexpected", name, "only tensors of modules that the model has"))
    for name in sorted(expected.keys() & tensors.keys()):
        if expected[name].shape != tensors[name].shape:
            shape = tuple(tensors[name].shape)
            faults.append(fault(str(folder), name, shape, f"the shape {tuple(expected[name].shape)}"))
    if faults:
        raise AdapterError(one_per_line(faults))


def saved_slices(
    model: PeftModel, recorded: Mapping[str, Any] | None, folder: Path, adapter_name: str
) -> dict[str, Slices]:
    """Return the slices of a loaded adapter: as recorded, else found by the zeros of B."""
    names = Names.of(model.get_base_model())
    found: dict[str, Slices] = {}
    changed: list[str] = []
    for name, layer in lora_layers(model).items():
        if name not in names.rows or adapter_name not in layer.lora_A:
            continue
        weight = layer.lora_B[adapter_name].weight.detach()
        rows = names.rows[name]
        if recorded is None:
            seen = ranked_by_zeros(weight, rows)
        else:
            seen = (int(recorded[name]["r"]), list(recorded[name]["names"])) if name in recorded else None
        if seen is None:
            continue
        parts = slices_named(seen[1], rows, seen[0])
        if parts[-1].rank_stop != weight.shape[1] or bool(weight[~inside(weight, parts)].any()):
            changed.append(name)
        else:
            found[name] = parts
    if changed:
        logger.warning(
            "%s: the blocks outside the slices are no longer zero in %d modules (%s, ...); "
            "it is read as an adapter of the fused modules.",
            folder,
            len(changed),
            changed[0],
        )
    return found
