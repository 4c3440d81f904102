"""Compile `library.c` for this processor, cache the library for the user, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from philora.runtime.user_cache import user_cache

_SOURCE = Path(__file__).with_name("library.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_SECONDS = 120
# at::native::cpublas::brgemm for bf16 and brgemm_release, which PyTorch exports: oneDNN's small products, computed by
# one thread each, on processors with bf16 instructions.
_PRODUCT = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
_PROBE = """
import ctypes, sys, torch
library, torch_cpu = map(ctypes.CDLL, sys.argv[1:3])
product, release = (ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p) for name in sys.argv[3:5])
sys.exit(0 if library.products_work(product, release) == 1 else 1)
"""


class Native(NamedTuple):
    """The compiled functions and, if they work on this machine, PyTorch's small products."""

    library: ctypes.CDLL
    product: int | None
    release: int | None


def available() -> bool:
    """Return whether the compiled functions can be used; the first call compiles them if they are not cached."""
    return os.environ.get("PHILORA_NATIVE", "1") != "0" and isinstance(load(), Native)


def describe() -> str:
    """Return in words what computes between the products on a CPU."""
    if os.environ.get("PHILORA_NATIVE", "1") == "0":
        return "PyTorch (PHILORA_NATIVE=0)"
    found = load()
    if isinstance(found, str):
        return f"PyTorch ({found})"
    return "compiled for this processor" + ("" if found.product else ", attention in PyTorch (no bf16 instructions)")


@functools.cache
def load() -> Native | str:
    """Return the functions, or why they cannot be used."""
    openmp = _openmp()
    if openmp is None:
        return "compiled functions need Linux and a PyTorch on GNU's OpenMP"
    try:
        path, multiplies = _compiled(openmp)
        library = ctypes.CDLL(str(path))
    except FileNotFoundError as error:
        return f"{error}: with gcc installed a step takes less time"
    except (OSError, subprocess.SubprocessError) as error:
        return f"compiling failed: {error}"
    if not multiplies:
        return Native(library, None, None)
    torch_cpu = ctypes.CDLL(str(_torch_cpu()))
    product, release = (ctypes.cast(getattr(torch_cpu, item), ctypes.c_void_p).value for item in (_PRODUCT, _RELEASE))
    return Native(library, product, release)


def _openmp() -> Path | None:
    """Return the path of the GNU OpenMP library that PyTorch has loaded; another copy would have its own threads."""
    if not sys.platform.startswith("linux"):
        return None
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        loaded = {Path(line.split(maxsplit=5)[5].strip()) for line in maps if "libgomp" in line}
    own = Path(torch.__file__).parent
    return next((item for item in loaded if own in item.parents), next(iter(loaded), None))


def _torch_cpu() -> Path:
    return Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


def _compiled(openmp: Path) -> tuple[Path, bool]:
    """Compile the library for this source, processor, PyTorch and OpenMP, unless it is cached.

    Returns:
        The library's path, and whether PyTorch's small products work with it.

    Raises:
        OSError: There is no compiler, or the cache cannot be written.
        subprocess.SubprocessError: The compiler failed.
    """
    with Path("/proc/cpuinfo").open(encoding="utf-8") as cpuinfo:
        features = sorted({line for line in cpuinfo if line.startswith(("flags", "Features", "model name"))})
    source = _SOURCE.read_text(encoding="utf-8")
    parts = [source, *_FLAGS, _PROBE, str(openmp), torch.__version__, platform.machine(), *features]
    name = f"native-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:24]}"
    folder = user_cache()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    library, multiplies = folder / f"{name}.so", folder / f"{name}.products"
    for item in (folder, library):
        if item.exists() and (item.stat().st_uid != os.getuid() or item.stat().st_mode & 0o022):
            raise PermissionError(f"{item} can be written by others")
    if not library.exists():
        wanted = os.environ.get("CC", "gcc")
        compiler = shutil.which(wanted)
        if compiler is None:
            raise FileNotFoundError(f"there is no {wanted}")
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            unlinked, linked = f"{temporary}/native.o", f"{temporary}/native.so"
            for command in (
                [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", unlinked],
                [compiler, "-shared", unlinked, str(openmp), "-lm", "-o", linked],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
            if any("avx512_bf16" in feature for feature in features):
                # In a separate process, since an unsupported instruction would end the process.
                probe = [sys.executable, "-c", _PROBE, linked, str(_torch_cpu()), _PRODUCT, _RELEASE]
                if subprocess.run(probe, check=False, capture_output=True, timeout=_SECONDS).returncode == 0:
                    multiplies.touch()
            Path(linked).replace(library)
    return library, multiplies.exists()
