"""Check what philora needs on this machine and what to do about faults, for `philora doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import constants, get_token

from philora import __version__
from philora.decoder_stack.choice import DeviceFacts
from philora.decoder_stack.facts import facts_of_device
from philora.files import checkpoint
from philora.models.loading import bf16_is_fast
from philora.native import build as native
from philora.planning.hardware import hardware_notices
from philora.runtime import hub
from philora.runtime.user_cache import user_cache

NEEDED = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "huggingface-hub",
)  # fmt: skip
OPTIONAL = {
    "bitsandbytes": "quantised bases: pip install 'philora[quantization]'",
    "uvicorn": "chat --web and serve: pip install 'philora[serve]'",
    "rouge-score": "ROUGE: pip install 'philora[evaluation]'",
    "sacrebleu": "BLEU and chrF: pip install 'philora[evaluation]'",
    "gguf": "llama.cpp and Ollama: pip install 'philora[gguf]'",
    "llama-cpp-python": "checking exports in llama.cpp: pip install llama-cpp-python",
    "triton": "kernels on a GPU: pip install 'philora[gpu]'",
}
LITTLE_SPACE_BYTES = 20_000_000_000
"""Space for a model with 3.8 G parameters, its cache and a run."""


class Finding(NamedTuple):
    """The result of one check.

    Attributes:
        name: What was checked.
        status: `ok`, `note` (philora works without it, or less well) or `fault` (it does not work).
        value: What was found.
        todo: What to do; empty if nothing.
    """

    name: str
    status: str
    value: str
    todo: str = ""


def examine() -> list[Finding]:
    """Check Python, the packages, the device, the compilers, the caches, the disk and the Hub."""
    python = f"{platform.python_version()}, {sys.executable}, {platform.platform()}"
    found = [Finding("philora", "ok", __version__), Finding("Python", "ok", python)]
    found += packages()
    found += device(facts_of_device(), torch.version.cuda, bf16_is_fast())
    found += [compilers(), *places(), the_hub(constants.HF_HUB_OFFLINE, not hub.reach(), get_token() is not None)]
    return found


def packages() -> Iterator[Finding]:
    """Yield the packages with their versions: required ones, then optional ones."""
    for name in NEEDED:
        there = _version(name)
        yield Finding(name, "ok" if there else "fault", there or "missing", "" if there else f"pip install {name}")
    for name, todo in OPTIONAL.items():
        there = _version(name)
        yield Finding(name, "ok" if there else "note", there or "not installed", "" if there else todo)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device(facts: DeviceFacts, cuda: str | None, fast_bf16: bool) -> list[Finding]:
    """Describe the device of runs by its facts, by the CUDA version of PyTorch, and by whether bf16 is in hardware."""
    capability = "" if facts.capability is None else f", compute capability {'.'.join(map(str, facts.capability))}"
    memory = f"{facts.name}, {facts.memory_bytes / 1e9:.1f} GB{capability}, PyTorch for CUDA {cuda or 'no'}"
    found = [Finding("device", "ok", memory)]
    found += [Finding("device", "note", notice) for notice in hardware_notices(facts, "auto", cuda)]
    slow = "bf16 is emulated: the base is loaded in float32, which takes twice the memory"
    found.append(Finding("bf16", "ok", "in hardware") if fast_bf16 else Finding("bf16", "note", slow))
    return found


def compilers() -> Finding:
    """Check whether philora's functions for the CPU are compiled here."""
    todo = "" if native.available() else "Install gcc with OpenMP; without it PyTorch computes, more slowly"
    return Finding("compiler", "note" if todo else "ok", native.describe(), todo)


def places() -> Iterator[Finding]:
    """Yield the folders that philora writes to: whether they can be written, and their free space."""
    folders = {
        "cache": Path(os.environ.get("PHILORA_CACHE") or user_cache()),
        "Hub's cache": Path(constants.HF_HUB_CACHE),
        "this folder": Path.cwd(),
    }
    for name, folder in folders.items():
        refused = checkpoint.unwritable(folder)
        if refused is not None:
            yield Finding(name, "fault", f"{folder}: {refused}", "Change its permissions so that you can write to it")
            continue
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        todo = "" if free > LITTLE_SPACE_BYTES else "A model of 3.8 G parameters needs about 20 GB for itself and a run"
        yield Finding(name, "note" if todo else "ok", f"{folder}, {free / 1e9:.1f} GB free", todo)


def the_hub(offline: bool, reached: bool, token: bool) -> Finding:
    """Check whether models can be downloaded: offline the environment forbids it; reached, the Hub's name is found."""
    if offline:
        return Finding("Hub", "note", "HF_HUB_OFFLINE is set: models come from the cache alone", "Unset it to download")
    if not reached:
        todo = "Give a local folder as model.name_or_path, or set HTTPS_PROXY"
        return Finding("Hub", "note", f"{constants.ENDPOINT} is not found: models come from the cache alone", todo)
    login = "logged in" if token else "no login: public models only, and nothing can be pushed"
    return Finding("Hub", "ok", f"{constants.ENDPOINT}, {login}")
