"""What people script against stays: names, commands, keys of the configuration, exit codes.

`surface.json` has all that a release has had. What is removed on purpose moves to its list `removed`, together with a
line in the changelog.
"""

from __future__ import annotations

import json
from pathlib import Path

import typer

import philora
from philora import errors, lora
from philora.cli.commands import app
from philora.configuration.fields import FIELDS

PROMISED = json.loads((Path(__file__).parent / "surface.json").read_text(encoding="utf-8"))
REMOVED = PROMISED.pop("removed")


def surface() -> dict:
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    return {
        "names": sorted(philora.__all__),
        "lora": sorted(lora.__all__),
        "commands": sorted(typer.main.get_command(app).commands),
        "keys": sorted(FIELDS),
        "exit_codes": {each.__name__: each.exit_code for each in classes if issubclass(each, errors.PhiloraError)},
    }


def lost(now: dict) -> list[str]:
    """What is promised and is not there, or is another exit code."""
    found = [f"{kind}: {name}" for kind in ("names", "lora", "commands", "keys") for name in PROMISED[kind]
             if name not in now[kind]]  # fmt: skip
    codes = [name for name, code in PROMISED["exit_codes"].items() if now["exit_codes"].get(name) != code]
    return found + [f"exit code: {name}" for name in codes]


def test_nothing_that_people_script_against_is_lost():
    assert lost(surface()) == []


def test_what_is_new_is_promised_from_now_on():
    assert surface() == PROMISED


def test_a_lost_name_is_found():
    now = surface()
    now["commands"].remove("merge")
    now["exit_codes"]["ConfigError"] = 1
    assert lost(now) == ["commands: merge", "exit code: ConfigError"]


def test_what_was_removed_is_public_no_more():
    assert [entry for entry in REMOVED if entry.partition(": ")[2] in surface()[entry.partition(": ")[0]]] == []
