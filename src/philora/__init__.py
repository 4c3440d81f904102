"""philora fine-tunes Phi language models with LoRA on a person's own chat data.

Names are imported when they are first used, so that `import philora` and the command line's help cost nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SFTConfig": "philora.training.trainer",
    "SFTTrainer": "philora.training.trainer",
    "coverage": "philora.adapters.peft_layers",
    "describe_data": "philora.dataset.describe",
    "evaluate": "philora.evaluation.assessment",
    "export": "philora.exporting.conversion",
    "get_peft_model": "philora.adapters.peft_layers",
    "load_adapter": "philora.adapters.peft_layers",
    "lora": "philora.lora",
    "merge": "philora.exporting.merging",
    "merge_to_folder": "philora.exporting.merged_folder",
    "optimize": "philora.adapters.peft_layers",
    "preflight": "philora.training.readiness",
    "push": "philora.reporting.pushing",
    "train": "philora.training.run",
}

if TYPE_CHECKING:
    from philora import lora
    from philora.adapters.peft_layers import coverage, get_peft_model, load_adapter, optimize
    from philora.dataset.describe import describe_data
    from philora.evaluation.assessment import evaluate
    from philora.exporting.conversion import export
    from philora.exporting.merged_folder import merge_to_folder
    from philora.exporting.merging import merge
    from philora.reporting.pushing import push
    from philora.training.readiness import preflight
    from philora.training.run import train
    from philora.training.trainer import SFTConfig, SFTTrainer

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
