"""Write a first configuration for a data source: a model that fits this machine and few settings, as YAML.

`philora init` writes the configuration; `philora train DATA` trains by the same one.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from philora import families
from philora.configuration.config import load_config
from philora.configuration.fields import FIELDS
from philora.configuration.sections import DataConfig, SourceConfig, plain
from philora.configuration.yaml_text import parse
from philora.dataset.prepare import shape_of
from philora.dataset.read import resolve
from philora.dataset.records import Fault
from philora.dataset.store import recognised
from philora.kernels.memory import available_bytes
from philora.models.loading import bf16_is_fast
from philora.runtime import hub

SUGGESTED = ("phi-3-mini", "phi-3.5-mini", "phi-4-mini")
"""Models for a first run if none is named; the first available one is chosen. All have 3.8 G parameters."""

BESIDE_THE_WEIGHTS_BYTES = 3_000_000_000
"""Estimate for adapter, optimizer and a short row in the first choice; `philora check` counts it exactly."""

NF4_BYTES = 0.7
"""Bytes of a parameter in nf4: half a byte and its scales, with embeddings in 16 bits."""

FEW_RECORDS = 8
"""With fewer records nothing is held out."""


class Machine(NamedTuple):
    """Facts of a machine that the choice of a model depends on.

    Attributes:
        device: `cuda`, `mps` or `cpu`.
        memory_bytes: Memory that is available to a run.
        weight_bytes: Bytes of a loaded parameter: 2 in bf16, 4 in fp32.
        quantizes: Whether bitsandbytes is installed.
        online: Whether the Hub can be reached.
        cached: Hub ids that are in the Hub's cache.
    """

    device: str
    memory_bytes: int
    weight_bytes: int
    quantizes: bool
    online: bool
    cached: frozenset[str]


class ModelChoice(NamedTuple):
    """A model for a first run: its name, the quantisation of its weights, and the reason."""

    name: str
    quantization: str
    reason: str


class Start(NamedTuple):
    """A first configuration.

    Attributes:
        text: The YAML.
        settings: The same as a mapping.
        found: A sentence about the data.
        model: The model and the reason.
    """

    text: str
    settings: dict[str, Any]
    found: str
    model: ModelChoice


def this_machine() -> Machine:
    """Return the facts of this machine."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    ids = [families.hub_id(entry) for entry in SUGGESTED]
    return Machine(
        device,
        available_bytes(device),
        2 if bf16_is_fast() else 4,
        importlib.util.find_spec("bitsandbytes") is not None,
        not hub.reach(),
        frozenset(entry for entry in ids if isinstance(try_to_load_from_cache(entry, "config.json"), str)),
    )


def choose_model(machine: Machine, named: str | None = None) -> ModelChoice:
    """Choose a model, and whether its weights are quantised.

    Args:
        machine: The facts.
        named: A given model; only its quantisation is chosen, if its size is known.
    """
    names = [families.hub_id(entry) for entry in SUGGESTED]
    chosen = next((name for name in names if name in machine.cached), names[0] if machine.online else None)
    name = families.hub_id(named) if named is not None else chosen
    where = f"{machine.memory_bytes / 1e9:.0f} GB on this machine's {machine.device}"
    if name is None:
        return ModelChoice("nano", "none", "a toy: the Hub cannot be reached, and no Phi model is in its cache")
    known = families.find(name)
    if known is None:
        return ModelChoice(name, "none", "as named")
    plain = known.parameters * machine.weight_bytes + BESIDE_THE_WEIGHTS_BYTES
    small = int(known.parameters * NF4_BYTES) + BESIDE_THE_WEIGHTS_BYTES
    if plain <= machine.memory_bytes:
        return ModelChoice(name, "none", f"needs about {plain / 1e9:.0f} GB of {where}")
    if small <= machine.memory_bytes and machine.quantizes:
        return ModelChoice(name, "nf4", f"in 4 bits it needs about {small / 1e9:.0f} GB of {where}")
    if named is not None:
        return ModelChoice(name, "nf4" if machine.quantizes else "none", f"as named; it may not fit {where}")
    fits = small <= machine.memory_bytes
    todo = "; pip install 'philora[quantization]' makes one fit" if fits else ""
    return ModelChoice("nano", "none", f"a toy: no Phi model fits {where}{todo}")


def start(data: str, model: str | None = None, machine: Machine | None = None, overrides: Sequence[str] = ()) -> Start:
    """Inspect data, choose a model, and return the configuration of a first run.

    Args:
        data: A file or folder that the readers support, or a hub id.
        model: Hub id, short name or folder; default: one that fits this machine.
        machine: Facts of the machine; default: this one.
        overrides: `KEY=VALUE` strings; those of `data` control how it is read, such as `data.train.columns={...}`.

    Raises:
        DataError: The data cannot be read, or its shape is not known.
        ConfigError: An override is wrong.
    """
    said = [text for text in overrides if text.partition("=")[0].strip().partition(".")[0] == "data"]
    given = load_config({"data": {"train": data}}, said).data if said else DataConfig((SourceConfig(path=data),))
    first = given.train[0]
    source, shape = recognised(resolve(first, "train"), shape_of(given, first))
    count = sum(len(batch.records) for batch in source.open())
    try:
        messages = shape.read(next(source.open()).records[0]).messages
    except Fault:  # `check` and `train` name every record that cannot be read
        messages = []
    turns = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
    found = f"{count:,} records of {data}, read as {shape.name}" + (f" (turns of {turns})" if turns else "")
    choice = choose_model(machine or this_machine(), model)
    given_source = plain(first)  # a path, or a mapping if more than the path was given
    train = json.dumps(data if isinstance(given_source, str) else given_source, ensure_ascii=False)
    text = _yaml(train, count, found, choice)
    return Start(text, parse(text)[1], found, choice)


def _yaml(train: str, count: int, found: str, choice: ModelChoice) -> str:
    """Return the configuration as text, with a comment on every line that is likely to be changed."""
    lines: list[tuple[str, str]] = [(f"# {found}", "")]
    lines += [("model:", ""), (f"  name_or_path: {json.dumps(choice.name, ensure_ascii=False)}", choice.reason)]
    commented = "# " if choice.quantization == "none" else ""
    lines += [(f"  {commented}quantization: nf4", "4-bit weights: a quarter of the memory, slower")]
    lines += [("data:", ""), (f"  train: {train}", "")]
    if count < FEW_RECORDS:
        lines.append(("  eval: null", "too few records to hold some out"))
    else:
        lines.append((f"  eval: {0.1 if count < 1000 else 0.05}", "held out, to score before and after"))
    epochs, length = (FIELDS[f"training_config.{key}"].default for key in ("num_train_epochs", "max_length"))
    rank, alpha = (FIELDS[f"peft_config.{key}"].default for key in ("r", "lora_alpha"))
    lines += [
        ("training_config:", ""),
        (f"  num_train_epochs: {epochs}", "passes over the data"),
        ("  learning_rate: auto", "by the model's size"),
        (f"  max_length: {length}", "tokens; longer conversations are cut"),
        ("peft_config:", ""),
        (f"  r: {rank}", "size of the adapter"),
        (f"  lora_alpha: {alpha}", "its weight; twice r is usual"),
    ]
    width = max(len(line) for line, comment in lines if comment)
    return "".join(f"{line.ljust(width)}  # {comment}\n" if comment else f"{line}\n" for line, comment in lines)
