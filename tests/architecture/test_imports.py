"""Packages import downward only, the command line needs no torch, and two modules write to the terminal."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import philora
from tools.architecture import BEGIN, END, ORDER, PAGE, packages, summary

ROOT = Path(philora.__file__).parent
UNIT = Path(__file__).parents[1] / "unit"

TORCH_FREE = [
    "errors", "families", "files.links", "runtime.process_state", "runtime.processes", "runtime.signals",
    "configuration.schema", "configuration.config", "reporting.display", "cli",
]  # fmt: skip


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def unit(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Names of philora's parts that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == "philora":
                found |= {parts[1]} if len(parts) > 1 else {name.name for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {each.name.split(".")[1] for each in node.names if each.name.startswith("philora.")}
    return found


def test_every_module_has_a_place():
    assert {unit(path) for path in ROOT.rglob("*.py")} - {"__init__"} == set(ORDER)


def strays(tests: Path) -> list[str]:
    """Test files not called `test_<module>.py` or `test_<module>_<topic>.py` after a module of their package."""
    found = []
    for path in tests.glob("*/test_*.py"):
        names = {part.stem for part in (ROOT / path.parent.name).glob("[!_]*")}
        words = path.stem.split("_")[1:]
        if names and not any("_".join(words[:count]) in names for count in range(1, len(words) + 1)):
            found.append(f"{path.parent.name}/{path.name}")
    return found


def test_the_unit_tests_mirror_the_package(tmp_path):
    packages = {path.parent.name for path in ROOT.glob("*/*.py")}
    folders = {path.parent.name for path in UNIT.glob("*/test_*.py")}
    assert packages - folders == {"cli"}, "the command line is tested by its commands, in tests/cli"
    assert strays(UNIT) == []
    (tmp_path / "lora").mkdir()
    for name in ("layers", "layers_in_bf16", "lora_layers"):
        (tmp_path / "lora" / f"test_{name}.py").touch()
    assert strays(tmp_path) == ["lora/test_lora_layers.py"]


def test_imports_point_down():
    wrong = []
    for path in ROOT.rglob("*.py"):
        part = unit(path)
        if part == "__init__":
            continue
        for name in imports(path) & set(ORDER):
            if name != part and ORDER.index(name) > ORDER.index(part):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_at_the_root_is_what_all_use():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py", "families.py"}


def modules(node: ast.ImportFrom) -> dict[str, str]:
    """Names in a file that are philora's modules."""
    folder = ROOT.parent / str(node.module).replace(".", "/")
    return {
        name.asname or name.name: name.name
        for name in node.names
        if (folder / f"{name.name}.py").is_file() or (folder / name.name / "__init__.py").is_file()
    }


def private_names(source: str) -> list[str]:
    """Names with a leading underscore that a file takes from another one."""
    found, imported = [], set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "philora":
            found += [name.name for name in node.names if re.match("_[^_]", name.name)]
            imported |= set(modules(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            found += [node.attr] if re.match("_[^_]", node.attr) else []
    return found


def test_no_file_takes_a_private_name_of_another():
    found = {path.relative_to(ROOT): private_names(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}


def test_a_private_name_that_is_taken_is_found():
    assert private_names("from philora.files.checkpoint import _sync") == ["_sync"]
    assert private_names("from philora.files import checkpoint\ncheckpoint._sync(1)") == ["_sync"]


def test_the_page_of_the_architecture_is_made_of_the_packages():
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == f"\n{packages()}", "run python tools/architecture.py"
    assert not [path for path in ROOT.rglob("*.py") if not summary(path)]


def test_top_modules_load_without_torch():
    names = ", ".join(f"philora.{name}" for name in TORCH_FREE)
    code = f"import {names}, sys; print([m for m in ('torch', 'transformers', 'peft', 'trl') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_lora_needs_torch_only():
    code = "import philora.lora, sys; print([m for m in ('transformers', 'peft', 'trl') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_only_the_command_line_prints_or_exits():
    wrong = []
    for path in ROOT.rglob("*.py"):
        if path.parent == ROOT / "cli":
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_only_the_command_line_and_the_display_have_a_terminal():
    """A console, or a write to a standard stream, anywhere else would be a second way in which things are shown."""
    wrong = []
    for path in ROOT.rglob("*.py"):
        if path.parent == ROOT / "cli" or path == ROOT / "reporting" / "display.py":
            continue
        for node in ast.walk(parsed(path)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("Console", "rich.print", "sys.stdout.write", "sys.stderr.write"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def test_every_package_that_is_imported_is_declared():
    """What a checkout has because a tool brought it is missing where only the wheel is installed."""
    project = tomllib.loads((ROOT.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *(v for k, v in project["optional-dependencies"].items() if k != "dev")]
    declared = {_canonical(re.split(r"[\[<>=~! ]", each)[0]) for names in lists for each in names}
    # Built from source where a compiler is, so no extra asks for them; what uses them goes without or says so.
    declared |= {"llama-cpp-python", "flash-attn", "liger-kernel"}
    declared |= {"ipython"}  # imported in the kernel of a notebook only, which is made of it
    distributions = {
        "IPython": ["ipython"],
        "llama_cpp": ["llama-cpp-python"],
        "flash_attn": ["flash-attn"],
        "liger_kernel": ["liger-kernel"],
    } | packages_distributions()
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {each.partition(".")[0] for each in names} - sys.stdlib_module_names - {"philora"}:
                if not declared & {_canonical(each) for each in distributions.get(top, [top])}:
                    wrong.append(f"{path.relative_to(ROOT)} imports {top}")
    assert not wrong


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_public_names():
    assert all(getattr(philora, name) is not None for name in philora.__all__)
    assert set(philora.__all__) <= set(dir(philora))


def test_no_module_is_named_like_a_public_function():
    """Importing `philora.name` replaces the attribute `name` of the package, so that a function there would be gone."""
    modules = {unit(path) for path in ROOT.rglob("*.py")}
    assert not (set(philora.__all__) - {"lora"}) & modules


def test_a_function_stays_a_function_after_its_module_is_imported():
    importlib.import_module("philora.training.readiness")
    assert callable(philora.preflight)
