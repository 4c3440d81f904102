"""What a run sets for its whole process: memory, products and the network, which other code in the process shares.

A run is a command of the command line, or `philora.train`. A call of the library (`optimize`, `get_peft_model`,
`load_adapter`, a merge, ...) leaves the process as it is; what it would set asks `is_run` first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_lock = threading.Lock()
_runs = 0


@contextmanager
def run() -> Iterator[None]:
    """In this block the process belongs to a run."""
    global _runs
    with _lock:
        _runs += 1
    try:
        yield
    finally:
        with _lock:
            _runs -= 1


def is_run() -> bool:
    """Whether the process belongs to a run now."""
    return _runs > 0


class _Deferred(ModuleType):
    """A package that is imported when something of it is first used; until then its `run` is None, as wandb's is."""

    def _real(self) -> ModuleType:
        name = self.__name__
        with _lock:
            if sys.modules.get(name) is self:
                del sys.modules[name]
        return importlib.import_module(name)

    def __getattr__(self, name: str) -> Any:
        if name == "run" and sys.modules.get(self.__name__) is self:
            return None
        if name.startswith("__") and name not in ("__path__", "__version__", "__all__"):
            raise AttributeError(name)  # `inspect` and `warnings` look at every module there is
        return getattr(self._real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):  # the import system's own
            super().__setattr__(name, value)
        else:
            setattr(self._real(), name, value)


def defer_wandb() -> None:
    """Have `import wandb` cost nothing until it is used: TRL imports it wherever it is installed.

    wandb's import starts by making folders, which stay when the process is killed.
    """
    if "wandb" in sys.modules:
        return
    spec = importlib.util.find_spec("wandb")
    if spec is None:
        return
    module = _Deferred("wandb")
    module.__spec__, module.__file__ = spec, spec.origin
    sys.modules["wandb"] = module
