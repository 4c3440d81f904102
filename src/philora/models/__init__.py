"""Find and load models, tokenizers and adapters."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Return `local_path`, which model cards import from here."""
    if name != "local_path":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from philora.models.loading import local_path

    return local_path
