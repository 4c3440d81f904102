"""Read a base's folder for merging and GGUF: its memory-mapped files, and how training quantised its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from philora.adapters.adapter_files import RECORD_NAME
from philora.errors import ModelError, fault, one_per_line
from philora.files.checkpoint import indexed_files
from philora.kernels.quantization import check_folder, keep_layout, require_bitsandbytes, scheme_of
from philora.models.loading import refuse_adapter
from philora.models.tokenizer_files import GENERATION_FILE, TOKENIZER_FILES
from philora.runtime.hub import reach

INDEX_NAME = "model.safetensors.index.json"
# Other files of a base that a merged model needs, or that the base's licence requires.
COMPANION_FILES = ("*.py", "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*")


def base_folder(base: str, revision: str | None = None) -> Path:
    """Return the folder of a base, after checking its config for merging; then the weights of a hub id are downloaded.

    Raises:
        ModelError: There is no such model, or its weights are quantised by another scheme than bitsandbytes'.
    """
    refuse_adapter(base, revision, where="base", key="name")
    folder = Path(base)
    remote = not folder.is_dir()
    if remote:
        small = ["config.json", INDEX_NAME, GENERATION_FILE, *TOKENIZER_FILES, *COMPANION_FILES]
        folder = _download(base, revision, small)
    check_folder(read_config_file(folder / "config.json"), base)
    return _download(base, revision, _weight_files(folder)) if remote else folder


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, **reach()))
    except (HFValidationError, OSError) as error:  # the hub's other errors are OSErrors
        expected = "the base model's folder, `nano`, or a model on the Hugging Face Hub"
        answer = " ".join(str(error).split())[:200]
        todo = f"Name the base yourself if it has moved: --base MODEL. The hub says: {answer}"
        raise ModelError(fault("merge", "base", name, expected, todo)) from error


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a base or an adapter.

    Raises:
        ModelError: It cannot be read.
    """
    try:
        return cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(fault(str(path), "content", str(error), "a JSON file", "Copy the base again")) from error


class TrainedOver(NamedTuple):
    """How the weights of an adapter's base were loaded in training.

    Attributes:
        dtype: Dtype of the weights before they were quantised.
        quantization: How they were quantised on loading; None if the files have them as they were used.
    """

    dtype: torch.dtype
    quantization: BitsAndBytesConfig | None


def read_trained_over(folder: Path, base: str, adapter: Path, fresh_base: bool) -> TrainedOver | None:
    """Read how the base was quantised, from its config or from the adapter's record; None if it was not.

    Raises:
        ModelError: The base's files are quantised although `fresh_base` is set, or bitsandbytes is not installed.
    """
    config = read_config_file(folder / "config.json")
    scheme = scheme_of(config)
    if scheme is not None:
        if fresh_base:
            todo = "Give the model that it was quantised from: --base PATH"
            raise ModelError(fault("merge", "base", base, f"a base of 16-bit weights; these are {scheme}", todo))
        dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        return TrainedOver(getattr(torch, dtype), None)
    record = read_config_file(adapter / RECORD_NAME).get("base") if (adapter / RECORD_NAME).is_file() else None
    if record is None or fresh_base:
        return None
    require_bitsandbytes("quantization", record["quantization"])
    keys = {key: value for key, value in record["quantization"].items() if not key.startswith(("_", "quant_method"))}
    return TrainedOver(getattr(torch, record["dtype"]), BitsAndBytesConfig(**keys))


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    return indexed_files(index) if index.is_file() else ["model.safetensors"]


def open_weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a model folder, memory-mapped, so that their bytes are read when they are used.

    Raises:
        ModelError: A file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    faults = []
    for name in _weight_files(folder):
        try:
            with safe_open(folder / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        except FileNotFoundError:
            todo = "Save it as such: AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)"
            faults.append(fault(str(folder), "file", name, "weights in safetensors files", todo))
        except (SafetensorError, OSError) as error:
            expected = "a complete safetensors file"
            faults.append(fault(str(folder / name), "content", str(error), expected, "Copy the base again"))
    if faults:
        raise ModelError(one_per_line(faults))
    return tensors


def load_trained_over(base: Path, trained_over: TrainedOver | None) -> PreTrainedModel:
    """Load the base as it was in training."""
    options: dict[str, Any] = {"dtype": "auto"}
    if trained_over is not None:
        options["dtype"] = trained_over.dtype
    if trained_over is not None and trained_over.quantization is not None:
        options["quantization_config"] = trained_over.quantization
    model = AutoModelForCausalLM.from_pretrained(base, **options).eval()
    keep_layout(model)
    return cast(PreTrainedModel, model)
