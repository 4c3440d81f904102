"""Read switches in the environment for code that runs on a GPU; `lora.functional` reads `PHILORA_FUSED`."""

from __future__ import annotations

import os


def stack_switch() -> str:
    """Return `PHILORA_STACK`: "0" turns the decoder stack off, "all" also takes what no GPU has run yet, else ""."""
    return os.environ.get("PHILORA_STACK", "")


def graph_switch() -> str:
    """Return `PHILORA_GRAPHS`: "0" turns CUDA graphs off, "all" also takes what no GPU has run yet, else ""."""
    return os.environ.get("PHILORA_GRAPHS", "")
