"""Switches in the environment for what runs on a GPU; `PHILORA_FUSED` is read in `lora.functional`."""

from __future__ import annotations

import os


def stack_switch() -> str:
    """Return `PHILORA_STACK`: "0" turns the decoder stack off, "all" also takes what no GPU has run yet, else ""."""
    return os.environ.get("PHILORA_STACK", "")


def graph_switch() -> str:
    """Return `PHILORA_GRAPHS`: "0" turns CUDA graphs off, "all" also takes what no GPU has run yet, else ""."""
    return os.environ.get("PHILORA_GRAPHS", "")
