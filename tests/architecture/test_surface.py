"""What people script against stays: names, commands, keys of the configuration, exit codes.

`surface.json` has all that a release has had. What is removed on purpose moves to its list `removed`, together with a
line in the changelog.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable
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


def unknown_imports(texts: Iterable[str]) -> list[str]:
    """Names that `from philora... import` asks for in texts, and that are not there."""
    found = []
    for text in texts:
        for module, names in re.findall(r"from (philora[\w.]*) import ([\w ,]+)", text):
            there = importlib.import_module(module)
            wanted = [name.split(" as ")[0].strip() for name in names.split(",")]
            found += [f"{module}: {name}" for name in wanted if name and not hasattr(there, name)]
    return found


def test_examples_and_pages_import_what_is_there():
    root = Path(__file__).parents[2]
    files = [*(root / "examples").glob("*.*y*"), *(root / "docs").glob("*.md"), root / "README.md"]
    texts = [file.read_text(encoding="utf-8") for file in files]
    assert sum("from philora" in text for text in texts) > 3
    assert unknown_imports(texts) == []
    assert unknown_imports(["from philora.lora import Linear, NoSuchLayer"]) == ["philora.lora: NoSuchLayer"]
