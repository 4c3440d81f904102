"""Each private name of a library is listed in that library's compat file, and the installed version has it."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from importlib.metadata import version
from pathlib import Path

import pytest

import philora
from philora.compat.private_names import PrivateName, exists, faults, require
from philora.errors import RunError

ROOT = Path(philora.__file__).parent
FILES = ("accelerate", "bitsandbytes", "datasets", "peft", "sacrebleu", "torch", "transformers", "trl")


def private(library: str) -> tuple[PrivateName, ...]:
    return importlib.import_module(f"philora.compat.{library}").PRIVATE


@pytest.mark.parametrize("library", FILES)
def test_the_installed_library_has_the_names(library):
    """A failure names the library, its version and the name: change the compat file, or bound the version."""
    pytest.importorskip(library)
    assert faults(private(library)) == []
    assert all(each.library == library and each.use and each.missing for each in private(library))


@pytest.mark.parametrize("library", FILES)
def test_a_missing_name_is_named_with_its_library_and_version(library):
    pytest.importorskip(library)
    path = private(library)[0].name.rpartition(".")[0]
    planted = PrivateName(f"{path}._no_such_name", "nothing", "nothing")
    (message,) = faults([*private(library), planted])
    assert f"{library}: version='{version(library)}'" in message
    assert f"{path}._no_such_name" in message


def test_an_attribute_of_instances_is_looked_for_in_the_source():
    assert exists("transformers.Trainer._tr_loss")
    assert not exists("transformers.Trainer._no_such_counter")
    assert not exists("transformers.no_such_module.Trainer")


def test_a_method_that_is_missing_stops_the_import():
    there, gone = "transformers.Trainer._run_epoch", "transformers.no_such.thing"
    require([PrivateName(there, "", "")])
    with pytest.raises(RunError, match=r"transformers: version='.*' - expected one that has transformers\.no_such\.t"):
        require([PrivateName(there, "", ""), PrivateName(gone, "", "")])


OURS = {"_asdict", "_replace", "_getframe", "_hf_hook", "_events", "_zero3_consolidated_16bit_state_dict"}
"""Not of a library that is listed: named tuples', Python's, starlette's attribute of ours; `_hf_hook` and DeepSpeed's
engine have no class to look at here (compat/accelerate.py speaks of both)."""


@functools.cache
def source() -> list[ast.Module]:
    return [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")]


def foreign_names(trees: list[ast.Module]) -> set[str]:
    """Underscore names that the source reads and does not define."""
    own, read = set(OURS), set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute):
                if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                    own.add(node.attr)
                else:
                    read.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                own.add(node.target.id)
            elif isinstance(node, ast.Assign):
                own |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
                read |= {str(value.value) for value in node.args[1:2] if isinstance(value, ast.Constant)}
    return {name for name in read - own if re.match("_[A-Za-z]", name)}


def test_every_foreign_private_name_is_listed():
    listed = {part for library in FILES for each in private(library) for part in each.name.split(".")}
    assert foreign_names(source()) - listed == set(), "list them in src/philora/compat, with what they are for"


def test_a_foreign_private_name_is_found():
    text = "def _own(): pass\nmodel._own()\nmodel._secret\nhasattr(model, '_other')\nmodel._TABLE"
    assert foreign_names([ast.parse(text)]) == {"_secret", "_other", "_TABLE"}


def foreign_imports(tree: ast.Module) -> set[str]:
    """Full paths that the source imports from private modules of other libraries."""
    return {
        f"{node.module}.{name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level and not str(node.module).startswith("philora")
        for name in node.names
        if any(re.match("_[A-Za-z]", part) for part in f"{node.module}.{name.name}".split("."))
    }


def test_every_import_from_a_private_module_is_listed():
    listed = {each.name for library in FILES for each in private(library)}
    found = {name for tree in source() for name in foreign_imports(tree)}
    assert found - listed == set(), "list them in src/philora/compat, with what they are for"
    text = "from torch._dynamo import config\nfrom torch import nn\nfrom torch.nn import _TABLE"
    assert foreign_imports(ast.parse(text)) == {"torch._dynamo.config", "torch.nn._TABLE"}
