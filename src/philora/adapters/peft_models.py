"""Make or load PEFT's models with strict names, slices and the fast layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM
from torch import nn
from transformers import PreTrainedModel

from philora.adapters.adapter_files import (
    RECORD_NAME,
    check_adapter,
    reading,
    recorded_slices,
    saved_slices,
    slice_record,
    sort_names,
)
from philora.adapters.embeddings import OwnWeights
from philora.adapters.fast_layers import FastForward, optimize
from philora.adapters.slices import Slices, inside, keep_zeros, lora_layers
from philora.adapters.targets import Names, is_lora, resolve
from philora.errors import AdapterError, fault
from philora.files.checkpoint import write_json
from philora.kernels.quantization import record as quantization_record
from philora.runtime.hub import download_adapter, parse_hub_path

logger = logging.getLogger(__name__)


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """Make a PeftModel with strict names, slices and the fast layers.

    Args:
        model: The base model; changed in place, as by PEFT.
        peft_config: Any PEFT config. For LoRA, every name must match something, and `target_modules` may name
            slices of fused projections (`q_proj`, `k_proj`, `v_proj`, `gate_proj`, `up_proj`). PEFT fills it in as
            usual; a config with slices is not changed.
        adapter_name: Name of the adapter.
        **kwargs: Further arguments of PEFT's function. Methods other than LoRA, and `mixed=True`, are left to PEFT.

    Returns:
        The PeftModel; adapters are fp32 unless `autocast_adapter_dtype=False` is given.

    Raises:
        TargetError: A name matches nothing; see `resolve`. The model is then unchanged.

    Example:
        >>> model = get_peft_model(base, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))  # doctest: +SKIP
    """
    if not is_lora(peft_config) or kwargs.get("mixed"):
        return cast(PeftModel, peft.get_peft_model(model, peft_config, adapter_name, **kwargs))
    given = cast(LoraConfig, peft_config)
    resolution = resolve(model, given)
    adapted = peft.get_peft_model(model, resolution.for_peft(given), adapter_name, **kwargs)
    optimize(adapted)
    apply_slices(adapted, resolution.slices, adapter_name)
    return cast(PeftModel, adapted)


def load_adapter(
    model: nn.Module, source: str | Path, adapter_name: str = "default", *, is_trainable: bool = False, **kwargs: Any
) -> PeftModel:
    """Load a saved PEFT adapter into a base model, after checking that every tensor fits.

    Args:
        model: The base model, or a PeftModel that gets one more adapter; the active one stays active.
        source: A folder in PEFT's format, or a hub id with an optional subfolder and revision:
            `OWNER/NAME/SUB/FOLDER@REVISION`.
        adapter_name: The adapter's name in the model.
        is_trainable: Whether training continues from it.
        **kwargs: Further arguments of `PeftModel.from_pretrained`.

    Returns:
        The PeftModel with the fast layers. Slices are taken from `philora.json`, else found by the zeros of B. If
        blocks outside the slices are no longer zero, it becomes a fused adapter, with a warning.

    Raises:
        AdapterError: The folder is no adapter, a file is damaged, or tensors are missing, unexpected or of a wrong
            shape. The model is then unchanged.
        TargetError: The adapter names modules that the model does not have.
    """
    folder = _local_folder(source)
    recorded: Mapping[str, Any] | None = None
    own: OwnWeights | None = None
    if folder.is_dir():
        plain = _without_adapters(model) if isinstance(model, PeftModel) else model
        config, tensors = check_adapter(plain, folder)
        with reading(folder):
            own = OwnWeights(model, config, tensors, folder)
        _check_changed_base(model, own, folder)
        recorded = recorded_slices(folder, Names.of(plain))
    elif folder.exists():
        raise AdapterError(fault("load_adapter", "source", str(source), "a folder", "Give the folder that holds it"))
    with reading(folder):
        before = {} if own is None else own.copies(model)
        path = str(folder if folder.is_dir() else source)
        if isinstance(model, PeftModel):
            model.load_adapter(path, adapter_name, is_trainable=is_trainable, **kwargs)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, path, adapter_name, is_trainable=is_trainable, **kwargs)
        if own is not None:
            own.put(adapted, adapter_name, before)
            adapted.changed_base = [*getattr(adapted, "changed_base", ()), *own.under_lora]
    optimize(adapted)
    apply_slices(adapted, saved_slices(adapted, recorded, folder, adapter_name), adapter_name)
    return cast(PeftModel, adapted)


def _local_folder(source: str | Path) -> Path:
    """Return an adapter's folder; one in a subfolder or revision on the Hub is downloaded. PEFT loads plain hub ids."""
    hub_path = None if Path(source).exists() else parse_hub_path(str(source))
    if hub_path is None or not (hub_path.subfolder or hub_path.revision):
        return Path(source)
    try:
        return download_adapter(hub_path)
    except (HFValidationError, OSError) as error:  # the hub's other errors are OSErrors
        expected, answer = "an adapter on the Hugging Face Hub", " ".join(str(error).split())[:200]
        raise AdapterError(fault("load_adapter", "source", str(source), expected, f"The hub says: {answer}")) from error


def _check_changed_base(model: nn.Module, own: OwnWeights, folder: Path) -> None:
    """Refuse an adapter that changes a base which other adapters use; warn if it is the only adapter.

    Raises:
        AdapterError: The model has an adapter already, and this one or that one changes the base itself.
    """
    changed = [*getattr(model, "changed_base", ()), *own.under_lora]
    if changed and isinstance(model, PeftModel):
        expected = "LoRA over the base's own weights, since another adapter shares the base"
        raise AdapterError(fault(str(folder), "embeddings", changed, expected, "Use it alone, or merge it"))
    if changed:
        logger.warning(
            "%s has its own complete weights of %s under its LoRA update. They replace the base's, "
            "so they are also used when the adapter is disabled.",
            folder,
            ", ".join(changed),
        )


def _without_adapters(model: PeftModel) -> nn.Module:
    """Return the base of a PeftModel without adapters and weights."""
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        expected = "a model of transformers, since it has an adapter already"
        raise AdapterError(fault("load_adapter", "model", type(base).__name__, expected, "Load it with PEFT"))
    with torch.device("meta"):
        skeleton = type(base)(copy.deepcopy(base.config))
    return cast(nn.Module, skeleton)


def apply_slices(model: PeftModel, slices: Mapping[str, Slices], adapter_name: str = "default") -> None:
    """Store in an adapter's layers which slices they hold, and keep B zero outside them.

    The layers have the ranks that `resolve` gave them; slices are by the full name of the fused module in the base.
    """
    for name, layer in lora_layers(model).items():
        if name not in slices or adapter_name not in layer.lora_A:
            continue
        up = layer.lora_B[adapter_name]
        up.slice_layout = slices[name]
        with torch.no_grad():
            up.weight.mul_(inside(up.weight, slices[name]))
        keep_zeros(layer)
        if not isinstance(layer, FastForward):  # PEFT's own forward runs there
            layer.register_forward_pre_hook(keep_zeros)
    if slices or quantization_record(model.get_base_model()):
        _remember_slices(model, slices, adapter_name)


class _RecordsSlices:
    """Make `save_pretrained` of a PeftModel also write the slices of its adapters and the base's quantisation."""

    philora_slices: dict[str, dict[str, Slices]]

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter as PEFT does, and its slices."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self.philora_slices.pop(adapter_name, None)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save as PEFT does, and write `philora.json` beside every adapter: slices, and how the base is quantised."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_main_process", True):
            return
        for adapter, slices in self.philora_slices.items():
            if kwargs.get("selected_adapters") and adapter not in kwargs["selected_adapters"]:
                continue
            folder = Path(save_directory) if adapter == "default" else Path(save_directory, adapter)
            if folder.is_dir():
                sort_names(folder / "adapter_config.json")
                base = self.get_base_model()  # type: ignore[attr-defined]
                write_json(folder / RECORD_NAME, slice_record(slices) | quantization_record(base))


class SlicedPeftModel(_RecordsSlices, PeftModel):  # type: ignore[misc]
    """`peft.PeftModel` that records slices when it is saved."""


class SlicedPeftModelForCausalLM(_RecordsSlices, PeftModelForCausalLM):  # type: ignore[misc]
    """`peft.PeftModelForCausalLM` that records slices when it is saved."""


SlicedPeftModel.__name__ = PeftModel.__name__
SlicedPeftModelForCausalLM.__name__ = PeftModelForCausalLM.__name__


def _remember_slices(model: PeftModel, slices: Mapping[str, Slices], adapter_name: str) -> None:
    recording = {PeftModel: SlicedPeftModel, PeftModelForCausalLM: SlicedPeftModelForCausalLM}.get(type(model))
    if recording is not None:
        model.__class__ = recording
        model.philora_slices = {}
    if isinstance(model, _RecordsSlices):
        model.philora_slices[adapter_name] = dict(slices)
