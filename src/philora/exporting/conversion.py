"""Export an adapter to another layout, and verify that it is the same adapter."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
from torch import nn
from transformers import PreTrainedModel

from philora.configuration.sections import ModelConfig
from philora.errors import ConfigError, fault, nearest, one_per_line
from philora.exporting.adapter import Adapter, as_fused, as_slices, check_updates, for_server
from philora.exporting.loralib_file import WEIGHTS_NAME, read_loralib, write_loralib
from philora.exporting.peft_folder import read_peft, write_peft
from philora.files.checkpoint import is_taken, new_folder, not_writable, unwritable, write_text
from philora.models.loading import load_model, load_skeleton
from philora.models.locate import AdapterSource, find_adapter, require_base, shown_base
from philora.models.tokenizer_files import Companions
from philora.models.verify import ROUNDED_ONCE, Agreement, Divergence, agreement, logits_of, probe

logger = logging.getLogger(__name__)

FORMATS = {
    "peft": ("server", "fused", "slices"),
    "loralib": (),
    "gguf": ("merged", "adapter", "base+adapter"),
    "ollama": ("merged", "base+adapter"),
}
"""The formats and their layouts; the first layout is the default."""

FILE_TYPES = ("f16", "q8_0", "f32")


class Exported(NamedTuple):
    """The result of `export`, and its comparison with the source adapter.

    Attributes:
        folder: The written folder.
        agreement: Comparison with the files as philora reads them.
        reader: Comparison with the files as llama.cpp reads them; None for other formats, or if it could not be run.
        reader_failure: Why llama.cpp could not be run; then only philora's own reader has checked the files.
    """

    folder: Path
    agreement: Agreement | Divergence
    reader: Divergence | None = None
    reader_failure: str | None = None


def export(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "peft",
    layout: str | None = None,
    dtype: str = "f16",
    base: str | None = None,
    lora_alpha: float | None = None,
) -> Exported:
    """Write an adapter in another layout. Nothing is written unless it computes the same.

    Args:
        source: Run folder, adapter folder, hub id, or a file in loralib's format (`.pt` or `.safetensors`).
        out: Folder to write; must not exist or be empty.
        format: `peft`, `loralib`, `gguf` (llama.cpp), or `ollama` (GGUF and a Modelfile).
        layout: For `peft`: `server` (the default) has one rank and one alpha for all modules, as llama.cpp and vLLM
            need (scale folded into B, ranks padded with zeros). `fused` has one matrix per fused module. `slices` has
            an update for every slice of a fused projection, as `get_peft_model` trains them.
            For `gguf` and `ollama`: `merged` (the default) is one model with the adapter in its weights.
            `base+adapter` is one file for the base and one for the adapter. `adapter` is the adapter's file only (not
            for `ollama`).
        dtype: For `gguf` and `ollama`: `f16`, `q8_0` or `f32`.
        base: Base model; default: the one that the adapter names.
        lora_alpha: For a loralib file without `lora.json`: the value of its layers.

    Returns:
        The folder, and the difference of logits between source and result.

    Cost:
        Loads the base once, in fp32 if there is enough memory, else in its own dtype.

    Raises:
        AdapterError: A file is damaged or does not fit the base, the layout does not support parts of the adapter, or
            the result does not compute the same. `out` is not changed.
        ConfigError: An argument is wrong, or `out` is not empty.
    """
    out = Path(out).expanduser()
    layout = layout or next(iter(FORMATS.get(format, ())), "")
    _check_arguments(format, layout, dtype, out)
    found = find_adapter(source, base)
    require_base(found)
    name = base or _base_name(found)
    if format in ("gguf", "ollama"):
        return _export_gguf(found, out, layout, dtype, name, lora_alpha, ollama=format == "ollama")
    result = _export_adapter(found, out, format, layout, name, lora_alpha)
    logger.info("%s: %s", out, result)
    return Exported(out, result)


def _export_adapter(
    found: AdapterSource, out: Path, format: str, layout: str, name: str, lora_alpha: float | None
) -> Agreement:
    """Write an adapter in PEFT's or loralib's format, read it again and compare the logits of both."""
    base = require_base(found)
    model = load_base(base, found.revision)
    tokens = probe(model.config.get_text_config().vocab_size, model.device)
    plain = logits_of(model, tokens)
    with restored(model):
        applied, adapter = read_adapter(model, found, lora_alpha)
        reference = logits_of(applied, tokens)
    if format == "loralib":
        wanted = adapter
    else:
        wanted = {"server": for_server, "fused": as_fused, "slices": as_slices}[layout](adapter, model)
    with new_folder(out) as folder:
        if format == "loralib":
            write_loralib(wanted, model, folder, name)
        else:
            write_peft(wanted, model, folder, name)
        with restored(model):
            written = folder / WEIGHTS_NAME if format == "loralib" else folder
            applied, again = read_adapter(model, AdapterSource(written, found.base), None)
            check_updates(adapter, again)
            bound = ROUNDED_ONCE[next(model.parameters()).dtype]
            result = agreement(f"export to {format}", reference, logits_of(applied, tokens), bound, plain)
        companions = Companions(found.path, Path(base), model.config)
        companions.write(folder, files=format == "peft")
        if format == "peft":
            write_text(folder / "README.md", _readme(name, layout, wanted, companions))
    return result


def _check_arguments(format: str, layout: str, dtype: str, out: Path) -> None:
    choices = [("format", format, tuple(FORMATS)), ("dtype", dtype, FILE_TYPES)]
    if FORMATS.get(format):
        choices.append(("layout", layout, FORMATS[format]))
    faults = [
        fault("export", name, value, "one of " + ", ".join(known), nearest(str(value), known))
        for name, value, known in choices
        if value not in known
    ]
    refused = unwritable(out)
    if refused is not None:
        faults.append(not_writable("export", "out", out, refused))
    elif is_taken(out):
        faults.append(fault("export", "out", str(out), "a new or empty folder", "Give another"))
    if format in ("gguf", "ollama") and importlib.util.find_spec("gguf") is None:
        faults.append(fault("export", "format", format, "the package gguf", "Install it: pip install 'philora[gguf]'"))
    if faults:
        raise ConfigError(one_per_line(faults))


def _export_gguf(
    found: AdapterSource, out: Path, layout: str, dtype: str, base: str, lora_alpha: float | None, *, ollama: bool
) -> Exported:
    from philora.exporting.gguf_export import write_gguf

    with new_folder(out) as folder:
        result = write_gguf(
            found,
            folder,
            layout=layout,
            file_type=dtype,
            name=out.name,
            base_name=shown_base(base),
            ollama=ollama,
            lora_alpha=lora_alpha,
        )
    logger.info("%s: %s", out, result.read_back)
    return Exported(out, result.read_back, result.llama, result.llama_failure)


def _base_name(found: AdapterSource) -> str:
    """Return what the result calls its base: the name that the source has for it, which may be a Hub id."""
    if found.path.is_dir():
        config = json.loads((found.path / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config.get("base_model_name_or_path") or found.base)
    return str(found.base)


def _readme(base: str, layout: str, adapter: Adapter, companions: Companions) -> str:
    rank = max(update.rank for update in adapter.updates.values())
    stops = ", ".join(f"`{stop_token}`" for stop_token in companions.stop_tokens)
    ends = f" An answer ends at {stops}; `stop_tokens.json` has them by id." if stops else ""
    serve = f"""
```
vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter=.
```
"""
    return f"""# An adapter of {base} in PEFT's format

Layout `{layout}`.{ends}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, ".")
```
{serve if layout == "server" else ""}"""


def load_base(name: str, revision: str | None = None) -> PreTrainedModel:
    """Return the base, in fp32 if there is memory for it, so that the comparison is as sharp as it can be."""
    base = ModelConfig(name_or_path=name, revision=revision)
    dtype = "float32" if fits_in_fp32(load_skeleton(base).num_parameters()) else "auto"
    return load_model(dataclasses.replace(base, dtype=dtype)).eval()


def fits_in_fp32(parameters: int) -> bool:
    """Return whether twice the memory of so many parameters in fp32 is free."""
    return bool(psutil.virtual_memory().available > 2 * 4 * parameters)


@contextmanager
def restored(model: PreTrainedModel) -> Iterator[None]:
    """Restore in the end what this block replaces of the model's modules and parameters."""
    held = [(module, type(module), dict(module._modules), dict(module._parameters)) for module in model.modules()]
    hooks = [(module, module._forward_pre_hooks.copy()) for module in model.modules()]
    attention = model.config._attn_implementation
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    biases = [(parameter, parameter.detach().clone()) for name, parameter in model.named_parameters() if "bias" in name]
    attributes = set(vars(model))
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        for module, kind, children, parameters in held:
            module.__class__ = kind
            module._modules = children
            module._parameters = parameters
        for module, before in hooks:
            module._forward_pre_hooks = before
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for parameter, trained in trains:
            parameter.requires_grad_(trained)
        for parameter, value in biases:  # PEFT loads trained biases into the base
            parameter.data.copy_(value)


def read_adapter(
    model: PreTrainedModel, source: AdapterSource, lora_alpha: float | None = None
) -> tuple[nn.Module, Adapter]:
    """Load an adapter into its base, in place, and return its updates.

    Returns:
        The model that computes with the adapter, and the adapter.

    Raises:
        AdapterError: A file is torn or does not fit, or it is no plain LoRA.
    """
    if source.path.is_file():
        return model, read_loralib(model, source.path, lora_alpha)
    return read_peft(model, source.path)
