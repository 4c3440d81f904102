"""philora fine-tunes Phi language models with LoRA on a person's own chat data.

Names are imported when they are first used, so that `import philora` and the command line's help cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SFTConfig": "philora.trainer",
    "SFTTrainer": "philora.trainer",
    "coverage": "philora.adapters",
    "describe_data": "philora.data.describe",
    "evaluate": "philora.assessment",
    "export": "philora.formats",
    "get_peft_model": "philora.adapters",
    "load_adapter": "philora.adapters",
    "lora": "philora.lora",
    "merge": "philora.merging",
    "merge_to_folder": "philora.merged_folder",
    "optimize": "philora.adapters",
    "preflight": "philora.readiness",
    "push": "philora.pushing",
    "train": "philora.training",
}

if TYPE_CHECKING:
    from philora import lora
    from philora.adapters import coverage, get_peft_model, load_adapter, optimize
    from philora.assessment import evaluate
    from philora.data.describe import describe_data
    from philora.formats import export
    from philora.merged_folder import merge_to_folder
    from philora.merging import merge
    from philora.pushing import push
    from philora.readiness import preflight
    from philora.trainer import SFTConfig, SFTTrainer
    from philora.training import train

__all__ = [
    "SFTConfig",
    "SFTTrainer",
    "coverage",
    "describe_data",
    "evaluate",
    "export",
    "get_peft_model",
    "load_adapter",
    "lora",
    "merge",
    "merge_to_folder",
    "optimize",
    "preflight",
    "push",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'philora' has no attribute {name!r}")
    module = import_module(_HOME[name])
    value = module if name in ("lora",) else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
