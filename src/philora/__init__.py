"""philora fine-tunes Phi language models with LoRA on a person's own chat data.

Names are imported when they are first used, so that `import philora` and the command line's help cost nothing.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Run": "philora.interface.run",
    "SFTConfig": "philora.training.trainer",
    "SFTTrainer": "philora.training.trainer",
    "chat": "philora.interface.functions",
    "check": "philora.interface.functions",
    "coverage": "philora.adapters.statistics",
    "demo": "philora.interface.functions",
    "describe_data": "philora.dataset.describe",
    "doctor": "philora.cli.doctor",
    "evaluate": "philora.interface.functions",
    "explain": "philora.cli.troubleshooting",
    "export": "philora.exporting.conversion",
    "generate": "philora.interface.functions",
    "get_peft_model": "philora.adapters.peft_models",
    "import_adapter": "philora.interface.functions",
    "init": "philora.interface.functions",
    "load": "philora.interface.run",
    "load_adapter": "philora.adapters.peft_models",
    "load_config": "philora.configuration.config",
    "lora": "philora.lora",
    "merge": "philora.exporting.merging",
    "merge_to_folder": "philora.exporting.merged_folder",
    "optimize": "philora.adapters.fast_layers",
    "preflight": "philora.training.readiness",
    "push": "philora.reporting.pushing",
    "report": "philora.interface.functions",
    "runs": "philora.interface.functions",
    "serve": "philora.interface.server",
    "train": "philora.interface.functions",
}

_NAMES = {"doctor": "examine", "explain": "entry_named"}
"""What a function is called in its module, where that differs."""

if TYPE_CHECKING:
    from philora import lora
    from philora.adapters.fast_layers import optimize
    from philora.adapters.peft_models import get_peft_model, load_adapter
    from philora.adapters.statistics import coverage
    from philora.cli.doctor import examine as doctor
    from philora.cli.troubleshooting import entry_named as explain
    from philora.configuration.config import load_config
    from philora.dataset.describe import describe_data
    from philora.exporting.conversion import export
    from philora.exporting.merged_folder import merge_to_folder
    from philora.exporting.merging import merge
    from philora.interface.functions import (
        chat,
        check,
        demo,
        evaluate,
        generate,
        import_adapter,
        init,
        report,
        runs,
        train,
    )
    from philora.interface.run import Run, load
    from philora.interface.server import serve
    from philora.reporting.pushing import push
    from philora.training.readiness import preflight
    from philora.training.trainer import SFTConfig, SFTTrainer

__all__ = [
    "Run",
    "SFTConfig",
    "SFTTrainer",
    "chat",
    "check",
    "coverage",
    "demo",
    "describe_data",
    "doctor",
    "evaluate",
    "explain",
    "export",
    "generate",
    "get_peft_model",
    "import_adapter",
    "init",
    "load",
    "load_adapter",
    "load_config",
    "lora",
    "merge",
    "merge_to_folder",
    "optimize",
    "preflight",
    "push",
    "report",
    "runs",
    "serve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'philora' has no attribute {name!r}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")  # of tqdm: philora has its own bar
        module = import_module(_HOME[name])
    value = module if name in ("lora",) else getattr(module, _NAMES.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
