"""The compiled functions are built once, in a folder of the user's alone; without them PyTorch computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from philora.native import build

pytestmark = pytest.mark.skipif(not build.available(), reason="no compiler")


def run(code: str, **environment: str) -> str:
    given = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=True)
    return done.stdout.strip()


ASK = "from philora.native import build; print(build.available())"


@pytest.mark.slow
def test_it_is_compiled_once_into_the_users_cache(tmp_path):
    assert run(ASK, XDG_CACHE_HOME=str(tmp_path)) == "True"
    (library,) = (tmp_path / "philora").glob("native-*.so")
    made = library.stat().st_mtime_ns
    assert run(ASK, XDG_CACHE_HOME=str(tmp_path), CC="false") == "True"
    assert library.stat().st_mtime_ns == made
    assert sorted(each.suffix for each in (tmp_path / "philora").iterdir()) in ([".so"], [".products", ".so"])


@pytest.mark.slow
def test_what_others_may_write_to_is_not_loaded(tmp_path):
    run(ASK, XDG_CACHE_HOME=str(tmp_path))
    (library,) = (tmp_path / "philora").glob("native-*.so")
    library.chmod(0o666)
    assert run(ASK, XDG_CACHE_HOME=str(tmp_path)) == "False"


SWIGLU = """
import torch
from philora.kernels.elementwise import swiglu
from philora.native import build
print(build.available(), swiglu(torch.ones(1, 4)).tolist(), build.describe(), sep="\\n")
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        pytest.param(
            {"CC": "no-such-compiler"},
            "PyTorch (there is no no-such-compiler: with gcc installed",
            marks=pytest.mark.slow,
        ),
        pytest.param({"CC": "false"}, "PyTorch (compiling failed: Command", marks=pytest.mark.slow),
        ({"PHILORA_NATIVE": "0"}, "PyTorch (PHILORA_NATIVE=0)"),
        pytest.param(
            {"XDG_CACHE_HOME": "/dev/null"},
            "PyTorch (compiling failed: [Errno 20] Not a directory",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_without_it_pytorch_computes(tmp_path, environment, reason):
    lines = run(SWIGLU, **{"XDG_CACHE_HOME": str(tmp_path), **environment}).splitlines()
    assert lines[0] == "False"
    assert lines[1].startswith("[[0.731")
    assert lines[2].startswith(reason)


def test_it_says_that_it_is_there():
    assert build.describe().startswith("compiled for this processor")


def test_the_source_is_in_the_package():
    assert (Path(build.__file__).parent / "library.c").is_file()
