"""The element-wise work of a step in one pass over memory each, compiled for this processor from `native.c`.

PyTorch's operations read and write memory one after another, so on a CPU what stands between the matrix products takes
as long as they do. Where gcc is at hand, the file beside this one is compiled once (about a second), kept in the user's
cache and called through ctypes; it runs on PyTorch's own OpenMP threads. Where it is not, or with `PHILORA_NATIVE=0` or
`PHILORA_FUSED=0` in the environment, the callers' PyTorch forms compute the same. No result depends on the number of
threads; dropout draws other masks than the PyTorch form does.

Every function takes contiguous tensors on the CPU in bf16 or fp32 (`usable`), computes in fp32 and rounds once.
"""

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
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from philora.user_cache import user_cache

_SOURCE = Path(__file__).with_suffix(".c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_SECONDS = 120


# at::native::cpublas::brgemm for bf16 and brgemm_release, which PyTorch exports: small products of oneDNN, each
# computed by one thread, on processors with bf16 instructions.
_PRODUCT = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
_PROBE = """
import ctypes, sys, torch
library, torch_cpu = map(ctypes.CDLL, sys.argv[1:3])
product, release = (ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p) for name in sys.argv[3:5])
sys.exit(0 if library.products_work(product, release) == 1 else 1)
"""


class _Native(NamedTuple):
    """The compiled functions and, where they work on this machine, PyTorch's small products."""

    library: ctypes.CDLL
    product: int | None
    release: int | None


def available() -> bool:
    """Whether the compiled functions are there; the first call compiles them where they are not in the cache yet."""
    return os.environ.get("PHILORA_NATIVE", "1") != "0" and isinstance(_native(), _Native)


def describe() -> str:
    """What computes between the products on a CPU, for people."""
    if os.environ.get("PHILORA_NATIVE", "1") == "0":
        return "PyTorch (PHILORA_NATIVE=0)"
    found = _native()
    if isinstance(found, str):
        return f"PyTorch ({found})"
    return "compiled for this processor" + ("" if found.product else ", attention in PyTorch (no bf16 instructions)")


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled functions take these tensors: plain, contiguous, on the CPU, all bf16 or all fp32."""
    dtype = tensors[0].dtype
    return (
        dtype in (torch.bfloat16, torch.float32)
        and all(
            each.device.type == "cpu"
            and each.dtype == dtype
            and each.is_contiguous()
            and type(each) in (Tensor, nn.Parameter)
            for each in tensors
        )
        and available()
    )


@functools.cache
def _native() -> _Native | str:
    """The functions, or why they are not there."""
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
        return _Native(library, None, None)
    torch_cpu = ctypes.CDLL(str(_torch_cpu()))
    product, release = (ctypes.cast(getattr(torch_cpu, each), ctypes.c_void_p).value for each in (_PRODUCT, _RELEASE))
    return _Native(library, product, release)


def _openmp() -> Path | None:
    """GNU's OpenMP library as PyTorch has loaded it: another copy would have threads of its own."""
    if not sys.platform.startswith("linux"):
        return None
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        loaded = {Path(line.split(maxsplit=5)[5].strip()) for line in maps if "libgomp" in line}
    own = Path(torch.__file__).parent
    return next((each for each in loaded if own in each.parents), next(iter(loaded), None))


def _torch_cpu() -> Path:
    return Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


def _compiled(openmp: Path) -> tuple[Path, bool]:
    """The library for this source, processor, PyTorch and OpenMP, compiled unless it is in the cache.

    Returns:
        Its path, and whether PyTorch's small products work with it.

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
    for each in (folder, library):
        if each.exists() and (each.stat().st_uid != os.getuid() or each.stat().st_mode & 0o022):
            raise PermissionError(f"{each} can be written by others")
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
            if any("avx512_bf16" in each for each in features):
                # In a process of its own: what PyTorch does not support there would end the process.
                probe = [sys.executable, "-c", _PROBE, linked, str(_torch_cpu()), _PRODUCT, _RELEASE]
                if subprocess.run(probe, check=False, capture_output=True, timeout=_SECONDS).returncode == 0:
                    multiplies.touch()
            Path(linked).replace(library)
    return library, multiplies.exists()


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a function of native.c: tensors by address, integers as size_t, numbers as float; last the threads."""
    native = _native()
    assert isinstance(native, _Native)
    values: list[object] = []
    for each in arguments:
        if isinstance(each, Tensor):
            values.append(ctypes.c_void_p(each.data_ptr()))
        elif isinstance(each, bool):
            values.append(ctypes.c_int(each))
        elif isinstance(each, int):
            values.append(ctypes.c_uint64(each))
        elif isinstance(each, float):
            values.append(ctypes.c_float(each))
        else:
            values.append(None)
    getattr(native.library, name)(*values, ctypes.c_int(torch.get_num_threads()))


def _wide(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`y = x / rms(x) * weight`, and one over each row's root mean square. Shapes: x (T, C); returns (T, C), (T)."""
    y, inverse = torch.empty_like(x), torch.empty(len(x))
    _call("rms_norm", x, weight, y, inverse, *x.shape, float(eps), _wide(x))
    return y, inverse


def rms_norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, dy: Tensor) -> Tensor:
    """Gradient of x. Shapes: x and dy (T, C), inverse (T)."""
    dx = torch.empty_like(x)
    _call("rms_norm_backward", x, weight, inverse, dy, dx, *x.shape, _wide(x))
    return dx


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`. Shapes: (T, 2 C), gate first; returns (T, C)."""
    rows, columns = len(gate_up), gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, columns)
    _call("swiglu", gate_up, y, rows, columns, _wide(gate_up))
    return y


def swiglu_backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    """Gradient of gate_up. Shapes: gate_up (T, 2 C), dy (T, C)."""
    result = torch.empty_like(gate_up)
    _call("swiglu_backward", gate_up, dy, result, *dy.shape, _wide(dy))
    return result


def keep_bits(rows: int, columns: int, dropped: int) -> Tensor:
    """Random bits that are 1 with probability 1 - dropped / 2^16, 16 in a word, the lowest bit first.

    Shapes:
        Returns (rows, columns / 16, rounded up) of int16.

    Numerics:
        The seed comes from torch's generator, the bits from Philox4x32-10.
    """
    words = torch.empty(rows, -(-columns // 16), dtype=torch.int16)
    seed = int(torch.empty((), dtype=torch.int64).random_(0, None))
    _call("keep_bits", seed, dropped, words, words.numel())
    return words


def keep(x: Tensor, words: Tensor) -> Tensor:
    """x where the bit is 1, else 0. Shapes: x (T, C), words (T, C / 16)."""
    y = torch.empty_like(x)
    _call("keep", x, words, y, *x.shape, _wide(x))
    return y


def add_kept_(y: Tensor, x: Tensor, words: Tensor) -> None:
    """Add x to y where the bit is 1. Shapes: both (T, C), words (T, C / 16)."""
    _call("add_kept", x, words, y, *x.shape, _wide(x))


def gather_heads(
    flat: Tensor,
    repeat: int,
    starts: Tensor,
    lengths: Tensor,
    length: int,
    angles: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Heads of some documents in fp32, rotated if there are angles, each `repeat` times, zero after a document's end.

    Args:
        flat: Heads of each token; the tokens may stand apart.
        repeat: Copies of each head.
        starts: First token of each document.
        lengths: Tokens of each document.
        length: Tokens of a document with its padding, L.
        angles: cos and sin of each token in fp32, contiguous.

    Shapes:
        flat (B·T, heads, D), cos and sin (B·T, half of the rotated columns), starts and lengths (documents) of int64;
        returns (heads · repeat · documents, L, D).
    """
    heads, width = flat.shape[1:]
    rows = torch.empty(heads * repeat * len(starts), length, width)
    sizes = flat.stride(0), heads, repeat, width
    _call("gather_heads", flat, *sizes, starts, lengths, len(starts), length, *_turns(angles), rows, _wide(flat))
    return rows


def scatter_heads(
    rows: Tensor,
    flat: Tensor,
    repeat: int,
    starts: Tensor,
    lengths: Tensor,
    angles: tuple[Tensor, Tensor] | None,
) -> None:
    """The way back into `flat`: copies of a head are added up, turned back and rounded; padding is left out.

    Shapes:
        rows (heads · repeat · documents, L, D); the others as in `gather_heads`.
    """
    heads, width = flat.shape[1:]
    sizes = heads, repeat, width
    ends = *_turns(angles), flat, flat.stride(0)
    _call("scatter_heads", rows, *sizes, starts, lengths, len(starts), rows.shape[1], *ends, _wide(flat))


def _turns(angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None, int]:
    return (None, None, 0) if angles is None else (*angles, angles[0].shape[1])


class _Attention(ctypes.Structure):
    """The struct of the same name in native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value")),
        *((name, ctypes.c_size_t) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, ctypes.c_size_t) for name in ("heads", "key_heads", "width")),
        *((name, ctypes.c_void_p) for name in ("starts", "lengths")),
        ("documents", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_size_t) for name in ("half", "window", "tokens")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("product", "release")),
    )


# Columns of a head that the blocks of native.c take: a multiple of the first, the second at most.
_WIDTHS = 16, 256


def attends(heads: Sequence[Tensor], scale: float) -> bool:
    """Whether `attend` takes these queries, keys and values. Shapes: three of (B·T, heads, D)."""
    width = heads[0].shape[2]
    return (
        scale > 0
        and width % _WIDTHS[0] == 0
        and width <= _WIDTHS[1]
        and all(each.dtype == torch.bfloat16 and each.stride()[1:] == (width, 1) for each in heads)
        and usable(*(each[:0] for each in heads))
        and isinstance(native := _native(), _Native)
        and native.product is not None
    )


def _description(
    heads: Sequence[Tensor],
    starts: Tensor,
    lengths: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    window: int | None,
    scale: float,
) -> _Attention:
    native = _native()
    assert isinstance(native, _Native)
    query, key, _ = heads
    cos, sin, half = _turns(angles)
    at = [None if each is None else each.data_ptr() for each in (*heads, starts, lengths, cos, sin)]
    sizes = query.shape[1], key.shape[1], query.shape[2]
    strides = [each.stride(0) for each in heads]
    last = half, window or 0, len(query), scale, native.product, native.release
    return _Attention(*at[:3], *strides, *sizes, *at[3:5], len(starts), *at[5:], *last)


def attend(
    heads: Sequence[Tensor],
    starts: Tensor,
    lengths: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Causal attention of each document, queries and keys rotated where there are angles.

    Args:
        heads: Queries, keys and values.
        starts: First token of each document, the longest first.
        lengths: Tokens of each document.
        angles: cos and sin of each token in fp32, contiguous.
        window: Keys that a query sees at most, itself included.
        scale: Positive multiplier of the scores.

    Shapes:
        heads three of (B·T, H or K, D), cos and sin (B·T, half of the rotated columns); returns the output (B·T, H, D)
        and the logarithm of each query's normaliser (H, B·T).

    Numerics:
        Products of bf16 with sums in fp32; rotated queries and keys and the softmax's exponentials are rounded to
        bf16, the output once.

    Raises:
        MemoryError: There was no room for a document's scores.
    """
    query = heads[0]
    output, normaliser = query.new_empty(query.shape), torch.empty(query.shape[1], len(query))
    _attend("attend", _description(heads, starts, lengths, angles, window, scale), output, normaliser)
    return output, normaliser


def attend_backward(
    heads: Sequence[Tensor],
    starts: Tensor,
    lengths: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    window: int | None,
    scale: float,
    saved: tuple[Tensor, Tensor],
    grad: Tensor,
    results: Sequence[Tensor],
) -> None:
    """Write the gradients of queries, keys and values.

    Args:
        heads: As in `attend`, and so the next five.
        starts: See there.
        lengths: See there.
        angles: See there.
        window: See there.
        scale: See there.
        saved: What `attend` returned.
        grad: Gradient of the output.
        results: Where the three gradients go, of the strides of `heads`.

    Raises:
        MemoryError: There was no room for a document's gradients.
    """
    output, normaliser = saved
    description = _description(heads, starts, lengths, angles, window, scale)
    _attend("attend_backward", description, output, grad, normaliser, *results)


def _attend(name: str, description: _Attention, *tensors: Tensor) -> None:
    native = _native()
    assert isinstance(native, _Native)
    values = [ctypes.c_void_p(each.data_ptr()) for each in tensors]
    if getattr(native.library, name)(ctypes.byref(description), *values, ctypes.c_int(torch.get_num_threads())):
        raise MemoryError("no memory for the attention of one document")


def causal_softmax_(scores: Tensor, offset: int, window: int | None, scale: float) -> None:
    """Softmax of scale · scores over the keys that a query sees, in place; zero elsewhere.

    Args:
        scores: Products of queries and keys.
        offset: Place of the first query among the keys.
        window: Keys that a query sees at most, itself included.
        scale: Positive multiplier.

    Shapes:
        scores (N, queries, keys).
    """
    _call("causal_softmax", scores, *scores.shape, offset, window or 0, float(scale))


def causal_softmax_backward_(weights: Tensor, grad: Tensor, offset: int, window: int | None, scale: float) -> None:
    """The gradient of the unscaled scores over that of the weights, in place. Shapes: both (N, queries, keys)."""
    _call("causal_softmax_backward", weights, grad, *grad.shape, offset, window or 0, float(scale))


def score_rows_(logits: Tensor, bias: Tensor | None, labels: Tensor, outputs: list[Tensor], needs_grad: bool) -> None:
    """Write log-probability, entropy and top-1 of each row; over the logits, the gradient of the log-probability.

    Shapes:
        logits (N, V), bias (V) of fp32, labels (N) of int64, outputs three of (N) of fp32.
    """
    _call("score_rows", logits, bias, labels, *outputs, *logits.shape, needs_grad, _wide(logits))


def from_4bit_(packed: Tensor, code: Tensor, scales: Tensor, weights: Tensor) -> None:
    """Write the weights that 4 bits each stand for, `code[index] * scale` of the block, rounded to bf16.

    Shapes:
        packed (N / 2) of uint8, the first of two weights in the high half; code (16) and scales (blocks) of fp32;
        weights of N elements of bf16, N / blocks a multiple of 32.
    """
    blocks = scales.numel()
    _call("from_4bit", packed, code, scales, weights, blocks, weights.numel() // blocks)
