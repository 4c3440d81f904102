"""Format numbers, counts, times and text for people."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

SECRETS = re.compile(r"hf_\w{8,}|(?<=hub_token: )\S+|(?<=hub_token=)\S+|(?<=api_key: )\S+|(?<=api_key=)\S+")
"""Secrets that a configuration or a command may contain and a shared page must not."""


def without_secrets(text: str) -> str:
    """Return text with tokens and keys replaced by dots."""
    return SECRETS.sub("•••", text)


def number(value: float) -> str:
    """Return a number with three or four significant digits, and an exponent only if it is very small or large."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−") if abs(value) < 1000 else f"{value:,.0f}".replace("-", "−")


def count(value: Any) -> str:
    """Return an integer with thousands separators, or a dash if it is not a number."""
    found = real(value)
    return "–" if found is None else f"{found:,.0f}"


def short_count(value: Any) -> str:
    """Return a count in three digits and a letter, such as 7.22M."""
    found = real(value)
    if found is None:
        return "–"
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(found) >= size:
            return f"{found / size:.3g}{letter}"
    return f"{found:.3g}"


def duration(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def real(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping unchanged, or an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}
