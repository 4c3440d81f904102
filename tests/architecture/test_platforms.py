"""What the main path may not take for granted: modules, functions and paths that other systems lack."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest

import philora
from philora.files.checkpoint import is_inside

ROOT = Path(philora.__file__).parent

# Absent on Windows: modules, and names of os and signal.
UNIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "readline", "pty")
UNIX_NAMES = {
    "os": {"fork", "getuid", "geteuid", "sched_getaffinity", "sched_setaffinity", "killpg", "setsid", "getpgid",
           "register_at_fork", "mkfifo", "nice", "wait"},
    "signal": {"SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "SIGPIPE", "alarm", "pause"},
}  # fmt: skip
# Where they stand behind a condition of the platform or of what Linux alone has.
GUARDED = {
    "training/callbacks.py": {"resource"},
    "files/checkpoint.py": {"fcntl", "os.register_at_fork"},
    "serving/terminal.py": {"readline", "termios"},
    "serving/connections.py": {"resource"},
    "kernels/memory.py": {"resource"},
    "runtime/template_process.py": {"resource"},
    "runtime/user_cache.py": {"os.getuid"},
    "dataset/store.py": {"os.sched_getaffinity"},
    "native/build.py": {"os.getuid"},
}


def test_what_unix_alone_has_is_behind_a_condition():
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                uses = {each.name for each in node.names} & set(UNIX_MODULES)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                uses = {f"{node.value.id}.{node.attr}"} if node.attr in UNIX_NAMES.get(node.value.id, ()) else set()
            else:
                continue
            if uses:
                found.setdefault(name, set()).update(uses)
    assert found == GUARDED


@pytest.mark.slow
def test_every_module_loads_without_what_windows_lacks():
    """In one process: the modules are blocked after the libraries, some of which guard them themselves, are loaded."""
    files = [path.relative_to(ROOT.parent).with_suffix("") for path in ROOT.rglob("*.py")]
    programs = ("__main__", "llama_process", "template_process")
    modules = [".".join(file.parts).removesuffix(".__init__") for file in files if file.name not in programs]
    code = f"""
import sys, os, signal
import torch, peft, datasets, bitsandbytes, gguf, starlette.responses, uvicorn
from trl.trainer.sft_trainer import SFTTrainer
for name in {UNIX_MODULES!r}: sys.modules[name] = None
for name in {sorted(UNIX_NAMES["os"])!r}:
    if hasattr(os, name): delattr(os, name)
import importlib
for name in {modules!r}: importlib.import_module(name)
print("all")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "all\n", done.stderr


@pytest.mark.parametrize("name", [str(PureWindowsPath("..", "x")), r"C:\x", r"a\..\..\b", r"\\server\share\x", "/x"])
def test_names_in_manifests_stay_inside_on_windows_too(name):
    assert not is_inside(name)


def test_manifests_hold_names_that_every_system_reads(tmp_path):
    from philora.files.checkpoint import faults_of, seal

    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.txt").write_text("x")
    seal(tmp_path)
    assert '"a/b/c.txt"' in (tmp_path / "philora_manifest.json").read_text(encoding="utf-8")
    assert not faults_of(tmp_path)


def test_text_is_read_and_written_as_utf_8():
    """Whatever the system's own encoding is: no file is opened as text without one."""
    wrong = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            mode = next((each.value for each in node.args if isinstance(each, ast.Constant)), "")
            text = {
                "read_text": not node.args,
                "write_text": ast.unparse(node.func.value) != "checkpoint",
                "open": bool(mode) and set(str(mode)) <= set("rwax+t"),
            }.get(node.func.attr, False)
            if text and not any(each.arg == "encoding" for each in node.keywords):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


@pytest.mark.skipif(os.name == "nt", reason="the other branch")
def test_what_is_synced_may_be_read_only(tmp_path):
    from philora.files.checkpoint import sync_file

    (tmp_path / "x").write_text("x")
    (tmp_path / "x").chmod(0o444)
    sync_file(tmp_path / "x")
