"""Turn command options that are settings into overrides of the configuration."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from philora.interface.choices import SETTINGS


def flag_overrides(context: typer.Context) -> list[str]:
    """Return the given options that are settings, as overrides."""
    given = []
    for name, key in SETTINGS.items():
        value = context.params[name]
        if value is None:
            continue
        if name == "target_modules" and "," in value:
            value = json.dumps([part.strip() for part in value.split(",")])
        elif name in ("model", "output") or (name == "evaluation" and Path(value).expanduser().exists()):
            value = json.dumps(value, ensure_ascii=False)  # always text, even if YAML would read a number
        given.append(f"{key}={value}")
    return given
