"""Call the functions of `library.c`: element-wise work of a step, each function in one pass over memory.

PyTorch's operations read and write memory one after another, so on a CPU the work between the matrix products takes as
long as the products. If gcc is installed, the C file is compiled once for this processor (about a second), cached for
the user and called through ctypes; it runs on PyTorch's own OpenMP threads. Without gcc, or with `PHILORA_NATIVE=0` or
`PHILORA_FUSED=0` in the environment, the callers compute the same in PyTorch. No result depends on the number of
threads. Dropout draws other masks than in PyTorch.

Every function takes contiguous tensors on the CPU in bf16 or fp32 (`usable`), computes in fp32 and rounds once. C
cannot check what an address points to, so every call checks kind, dtype, shape and ranges of its arguments, and raises
ValueError if one does not fit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from philora.errors import fault
from philora.native.build import Native, available, load

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.bfloat16, torch.float32)


def usable(*tensors: Tensor) -> bool:
    """Return whether the compiled functions take these tensors: plain, contiguous, on the CPU, all bf16 or all fp32.

    They are not used while PyTorch's operations are recorded or intercepted (`watched`).
    """
    dtype = tensors[0].dtype
    return (
        dtype in _DTYPES
        and all(
            type(tensor) in _PLAIN
            and tensor.is_cpu
            and tensor.dtype == dtype
            and tensor.is_contiguous()
            and not tensor.is_neg()
            and not tensor._is_zerotensor()
            for tensor in tensors
        )
        and not watched()
        and available()
    )


def watched() -> bool:
    """Return whether PyTorch's operations are recorded or intercepted, so that a compiled function would be missed.

    This is so in torch.jit.trace (where sizes are tensors, too), in torch.func's transforms, and in modes of
    `__torch_dispatch__`, such as those of make_fx and of fake tensors.
    """
    return (
        torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


# Arguments of a C function: addresses of checked tensors, sizes, numbers, switches.
_Argument = ctypes.c_void_p | int | float | None
# The most columns of a head that fit on a thread's stack.
_WIDEST_HEAD = 4096


def _call(name: str, *arguments: _Argument) -> None:
    """Call a C function with integers as size_t, other numbers as float, switches as int, and the thread count."""
    if watched():
        raise ValueError(fault(f"philora.native.{name}", "call", "watched", "no tracing, transform or dispatch mode"))
    values: list[object] = []
    for argument in arguments:
        if isinstance(argument, bool):
            values.append(ctypes.c_int(argument))
        elif isinstance(argument, int):
            if not 0 <= argument < 2**63:
                raise ValueError(fault(f"philora.native.{name}", "size", argument, "a number from 0 to 2^63 - 1"))
            values.append(ctypes.c_uint64(argument))
        elif isinstance(argument, float):
            values.append(ctypes.c_float(argument))
        else:
            values.append(argument)
    getattr(_loaded().library, name)(*values, ctypes.c_int(torch.get_num_threads()))


def _loaded() -> Native:
    native = load()
    assert isinstance(native, Native)
    return native


def _misfit(name: str, argument: str, found: object, expected: str) -> ValueError:
    """Return the error about an argument of a function."""
    if isinstance(found, Tensor):
        found = f"{type(found).__name__} {found.dtype} {tuple(found.shape)} {found.device}"
    return ValueError(fault(f"philora.native.{name}", argument, found, expected))


def _plain(tensor: object) -> bool:
    """Return whether an object is a tensor whose elements are the values in its memory."""
    return type(tensor) in _PLAIN and tensor.is_cpu and not tensor.is_neg()  # type: ignore[attr-defined]


def _address(name: str, argument: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> ctypes.c_void_p:
    """Return the address of a tensor's elements.

    Raises:
        ValueError: The tensor is not plain and contiguous, of this dtype and shape and on the CPU, or has no memory.
    """
    if not (_plain(tensor) and tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous()):
        raise _misfit(name, argument, tensor, f"a plain, contiguous {dtype} tensor of shape {tuple(shape)} on the CPU")
    return ctypes.c_void_p(_pointer(name, argument, tensor))


def _pointer(name: str, argument: str, tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise _misfit(name, argument, tensor, "a tensor with memory")
    return address


def _dtype_of(name: str, argument: str, tensor: Tensor, dimensions: int) -> torch.dtype:
    """Return the dtype of a bf16 or fp32 tensor with this number of dimensions.

    Raises:
        ValueError: It has another dtype or number of dimensions.
    """
    if not (_plain(tensor) and tensor.dtype in _DTYPES and tensor.ndim == dimensions):
        raise _misfit(name, argument, tensor, f"a plain bf16 or fp32 tensor of {dimensions} dimensions on the CPU")
    return tensor.dtype


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype == torch.float32


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an uninitialised tensor on the CPU, regardless of the default device and dtype."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `x / rms(x) * weight` and one over the root mean square of rows. Shapes: x (T, C); returns (T, C), (T)."""
    name, dtype = "rms_norm", _dtype_of("rms_norm", "x", x, 2)
    rows, columns = x.shape
    y, inverse = _empty(rows, columns, dtype=dtype), _empty(rows)
    _call(
        name,
        _address(name, "x", x, dtype, x.shape),
        _address(name, "weight", weight, dtype, (columns,)),
        _address(name, "y", y, dtype, x.shape),
        _address(name, "inverse", inverse, torch.float32, (rows,)),
        rows, columns, float(eps), _is_wide(dtype),
    )  # fmt: skip
    return y, inverse


def rms_norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, dy: Tensor) -> Tensor:
    """Return the gradient of x. Shapes: x and dy (T, C), inverse (T) or (T, 1)."""
    name, dtype = "rms_norm_backward", _dtype_of("rms_norm_backward", "x", x, 2)
    rows, columns = x.shape
    dx = _empty(rows, columns, dtype=dtype)
    _call(
        name,
        _address(name, "x", x, dtype, x.shape),
        _address(name, "weight", weight, dtype, (columns,)),
        _address(name, "inverse", inverse.reshape(-1), torch.float32, (rows,)),
        _address(name, "dy", dy, dtype, x.shape),
        _address(name, "dx", dx, dtype, x.shape),
        rows, columns, _is_wide(dtype),
    )  # fmt: skip
    return dx


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up`. Shapes: (T, 2 C), gate first; returns (T, C)."""
    name, dtype = "swiglu", _dtype_of("swiglu", "gate_up", gate_up, 2)
    rows, columns = len(gate_up), gate_up.shape[1] // 2
    y = _empty(rows, columns, dtype=dtype)
    _call(
        name,
        _address(name, "gate_up", gate_up, dtype, (rows, 2 * columns)),
        _address(name, "y", y, dtype, (rows, columns)),
        rows, columns, _is_wide(dtype),
    )  # fmt: skip
    return y


def swiglu_backward(gate_up: Tensor, dy: Tensor) -> Tensor:
    """Return the gradient of gate_up. Shapes: gate_up (T, 2 C), dy (T, C)."""
    name, dtype = "swiglu_backward", _dtype_of("swiglu_backward", "dy", dy, 2)
    rows, columns = dy.shape
    result = _empty(rows, 2 * columns, dtype=dtype)
    _call(
        name,
        _address(name, "gate_up", gate_up, dtype, (rows, 2 * columns)),
        _address(name, "dy", dy, dtype, dy.shape),
        _address(name, "result", result, dtype, (rows, 2 * columns)),
        rows, columns, _is_wide(dtype),
    )  # fmt: skip
    return result


def keep_bits(rows: int, columns: int, dropped: int) -> Tensor:
    """Return random bits that are 1 with probability 1 - dropped / 2^16, 16 in a word, the lowest bit first.

    Shapes:
        Returns (rows, columns / 16, rounded up) of int16.

    Numerics:
        The seed comes from torch's generator, the bits from Philox4x32-10.
    """
    words = _empty(rows, -(-columns // 16), dtype=torch.int16)
    seed = int(_empty(dtype=torch.int64).random_(0, None))
    address = _address("keep_bits", "words", words, torch.int16, words.shape)
    _call("keep_bits", seed, dropped, address, words.numel())
    return words


def keep(x: Tensor, words: Tensor) -> Tensor:
    """Return x where the bit is 1, else 0. Shapes: x (T, C), words (T, C / 16)."""
    y = _empty(*x.shape, dtype=x.dtype)
    _masked("keep", x, words, y)
    return y


def add_kept_(y: Tensor, x: Tensor, words: Tensor) -> None:
    """Add x to y where the bit is 1. Shapes: both (T, C), words (T, C / 16)."""
    _masked("add_kept", x, words, y)


def _masked(name: str, x: Tensor, words: Tensor, y: Tensor) -> None:
    dtype = _dtype_of(name, "x", x, 2)
    rows, columns = x.shape
    _call(
        name,
        _address(name, "x", x, dtype, x.shape),
        _address(name, "words", words, torch.int16, (rows, -(-columns // 16))),
        _address(name, "y", y, dtype, x.shape),
        rows, columns, _is_wide(dtype),
    )  # fmt: skip


def gather_heads(
    flat: Tensor, repeat: int, starts: Tensor, lengths: Tensor, length: int, angles: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Gather the heads of documents in fp32, rotated if there are angles, repeated, and zero at padding.

    Args:
        flat: Heads of every token; the tokens need not be adjacent in memory.
        repeat: Copies of every head, at least one.
        starts: First token of every document.
        lengths: Tokens of every document.
        length: Tokens of a document with padding, L.
        angles: cos and sin of every token in fp32, contiguous.

    Shapes:
        flat (B·T, heads, D), cos and sin (B·T, half of the rotated columns), starts and lengths (documents) of int64;
        returns (heads · repeat · documents, L, D).
    """
    name = "gather_heads"
    _check_heads(name, "flat", flat)
    tokens, heads, width = flat.shape
    places = _documents(name, starts, lengths, tokens, length)
    rows = _empty(heads * repeat * len(starts), length, width)
    to = _address(name, "rows", rows, torch.float32, rows.shape)
    sizes = flat.stride(0), heads, repeat, width
    source = ctypes.c_void_p(_pointer(name, "flat", flat))
    rotation = _rotation(name, angles, tokens, width)
    _call(name, source, *sizes, *places, len(starts), length, *rotation, to, _is_wide(flat.dtype))
    return rows


def scatter_heads(
    rows: Tensor, flat: Tensor, repeat: int, starts: Tensor, lengths: Tensor, angles: tuple[Tensor, Tensor] | None
) -> None:
    """Reverse `gather_heads` into `flat`: sum the copies of a head, rotate back, round, and drop padding.

    Shapes:
        rows (heads · repeat · documents, L, D); the others as in `gather_heads`.
    """
    name = "scatter_heads"
    _check_heads(name, "flat", flat)
    tokens, heads, width = flat.shape
    _dtype_of(name, "rows", rows, 3)
    length = rows.shape[1]
    source = _address(name, "rows", rows, torch.float32, (heads * repeat * len(starts), length, width))
    places = _documents(name, starts, lengths, tokens, length)
    rotation = _rotation(name, angles, tokens, width)
    ends = ctypes.c_void_p(_pointer(name, "flat", flat)), flat.stride(0)
    sizes = heads, repeat, width
    _call(name, source, *sizes, *places, len(starts), length, *rotation, *ends, _is_wide(flat.dtype))


def _check_heads(name: str, argument: str, flat: Tensor) -> None:
    """Check that the heads of a token are adjacent in memory, and fit on a thread's stack.

    Raises:
        ValueError: They are not, or do not fit.
    """
    _dtype_of(name, argument, flat, 3)
    width = flat.shape[2]
    if flat.stride()[1:] != (width, 1) or not 0 < width <= _WIDEST_HEAD:
        raise _misfit(name, argument, flat, f"adjacent heads of 1 to {_WIDEST_HEAD} columns")


def _ranges(starts: Tensor, lengths: Tensor, tokens: int) -> tuple[int, int, int, int, bool]:
    """Return the ranges of starts and lengths, and whether a document exceeds the tokens.

    All layers of a step have the same documents, so the result is cached on `starts` until one of them is written to.
    """
    tracked = not (starts.is_inference() or lengths.is_inference())
    key = (tokens, starts._version, lengths._version) if tracked else None
    kept = getattr(starts, "philora_ranges", None)
    if kept is not None and kept[0] is lengths and kept[1] == key:
        return cast("tuple[int, int, int, int, bool]", kept[2])
    (low, high), (least, most) = (tuple(map(int, torch.aminmax(numbers))) for numbers in (starts, lengths))
    beyond = low >= 0 and high + most > tokens and bool((lengths > tokens - starts).any())
    if tracked:
        setattr(starts, "philora_ranges", (lengths, key, (low, high, least, most, beyond)))  # noqa: B010
    return low, high, least, most, beyond


def _documents(
    name: str, starts: Tensor, lengths: Tensor, tokens: int, longest: int
) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """Return the addresses of the documents' first tokens and lengths.

    Raises:
        ValueError: A document exceeds the tokens, or is longer than `longest`.
    """
    count = len(starts)
    first = _address(name, "starts", starts, torch.int64, (count,))
    second = _address(name, "lengths", lengths, torch.int64, (count,))
    if count:
        low, high, least, most, beyond = _ranges(starts, lengths, tokens)
        if low < 0 or least < 0 or most > longest or beyond:
            found = f"{low:,} to {high:,} and {least:,} to {most:,}"
            raise _misfit(name, "starts and lengths", found, f"documents of up to {longest:,} of {tokens:,} tokens")
    return first, second


def _rotation(
    name: str, angles: tuple[Tensor, Tensor] | None, tokens: int, width: int
) -> tuple[ctypes.c_void_p | None, ctypes.c_void_p | None, int]:
    """Return the addresses of cos and sin, and their number of columns.

    Raises:
        ValueError: They have more than half of a head's columns, or do not fit otherwise.
    """
    if angles is None:
        return None, None, 0
    cos, sin = angles
    _dtype_of(name, "cos", cos, 2)
    half = cos.shape[1]
    if 2 * half > width:
        raise _misfit(name, "cos", cos, f"at most {width // 2} columns, half of a head's")
    shape = tokens, half
    return _address(name, "cos", cos, torch.float32, shape), _address(name, "sin", sin, torch.float32, shape), half


class _Attention(ctypes.Structure):
    """The struct of the same name in library.c."""

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


# Columns of a head that the blocks of library.c take: a multiple of the first, the second at most.
_WIDTHS = 16, 256


def attends(heads: Sequence[Tensor], scale: float) -> bool:
    """Return whether `attend` takes these queries, keys and values. Shapes: three of (B·T, heads, D)."""
    width = heads[0].shape[2]
    return (
        scale > 0
        and width % _WIDTHS[0] == 0
        and width <= _WIDTHS[1]
        and all(head.dtype == torch.bfloat16 and head.stride()[1:] == (width, 1) for head in heads)
        and usable(*(head[:0] for head in heads))
        and isinstance(native := load(), Native)
        and native.product is not None
    )


class Causal(NamedTuple):
    """How the heads of documents attend.

    Attributes:
        starts: First token of every document, the longest first.
        lengths: Tokens of every document.
        angles: cos and sin of every token in fp32, contiguous; None if heads are not rotated.
        window: Number of keys that a query sees at most, itself included; None for all.
        scale: Positive multiplier of the scores.

    Shapes:
        starts and lengths (documents), cos and sin (B·T, half of the rotated columns).
    """

    starts: Tensor
    lengths: Tensor
    angles: tuple[Tensor, Tensor] | None
    window: int | None
    scale: float


def _description(name: str, heads: Sequence[Tensor], causal: Causal) -> _Attention:
    """Return the struct of the arguments, after checking them.

    Raises:
        ValueError: An argument does not fit.
    """
    query, key, value = heads
    starts, lengths, angles, window, scale = causal
    for argument, item in (("query", query), ("key", key), ("value", value)):
        _check_heads(name, argument, item)
    if not attends(heads, scale):
        raise _misfit(name, "query", query, "bf16 heads that `attends` takes, and a scale above 0")
    tokens, count, width = query.shape
    groups = key.shape[1]
    if key.shape != value.shape or key.shape[::2] != query.shape[::2] or not groups or count % groups:
        found = [tuple(head.shape) for head in heads]
        raise _misfit(name, "heads", found, "queries, keys and values of the same tokens, with H a multiple of K")
    if window is not None and not (type(window) is int and 0 < window < 2**63):
        raise _misfit(name, "window", window, "None or a whole number of at least 1")
    native = _loaded()
    places = _documents(name, starts, lengths, tokens, tokens)
    cos, sin, half = _rotation(name, angles, tokens, width)
    at = [ctypes.c_void_p(_pointer(name, "heads", head)) for head in heads]
    strides = [head.stride(0) for head in heads]
    last = half, window or 0, tokens, scale, native.product, native.release
    return _Attention(*at, *strides, count, groups, width, *places, len(starts), cos, sin, *last)


def attend(heads: Sequence[Tensor], causal: Causal) -> tuple[Tensor, Tensor]:
    """Compute causal attention of every document, with queries and keys rotated if there are angles.

    Shapes:
        heads three of (B·T, H or K, D); returns the output (B·T, H, D) and the logarithm of every query's normaliser
        (H, B·T).

    Numerics:
        Products of bf16 with sums in fp32; rotated queries and keys and the softmax's exponentials are rounded to
        bf16, the output once.

    Raises:
        MemoryError: There is not enough memory for a document's scores.
    """
    description = _description("attend", heads, causal)
    tokens, count, width = heads[0].shape
    output, normaliser = _empty(tokens, count, width, dtype=torch.bfloat16), _empty(count, tokens)
    _attend(
        "attend",
        description,
        _address("attend", "output", output, torch.bfloat16, output.shape),
        _address("attend", "normaliser", normaliser, torch.float32, normaliser.shape),
    )
    return output, normaliser


def attend_backward(
    heads: Sequence[Tensor], causal: Causal, saved: tuple[Tensor, Tensor], grad: Tensor, results: Sequence[Tensor]
) -> None:
    """Write the gradients of queries, keys and values.

    Args:
        heads, causal: As in `attend`.
        saved: Results of `attend`.
        grad: Gradient of the output.
        results: Memory for the three gradients, with the strides of `heads`.

    Raises:
        MemoryError: There is not enough memory for a document's gradients.
    """
    name, (output, normaliser) = "attend_backward", saved
    description = _description(name, heads, causal)
    tokens, count, _ = shape = heads[0].shape
    for argument, item, like in zip(("d_query", "d_key", "d_value"), results, heads, strict=True):
        _check_heads(name, argument, item)
        if item.shape != like.shape or item.stride() != like.stride() or item.dtype != like.dtype:
            raise _misfit(name, argument, item, f"the shape and strides of its head, {tuple(like.shape)}")
    _attend(
        name,
        description,
        _address(name, "output", output, torch.bfloat16, shape),
        _address(name, "grad", grad, torch.bfloat16, shape),
        _address(name, "normaliser", normaliser, torch.float32, (count, tokens)),
        *(ctypes.c_void_p(_pointer(name, "results", result)) for result in results),
    )


def _attend(name: str, description: _Attention, *addresses: ctypes.c_void_p) -> None:
    if getattr(_loaded().library, name)(ctypes.byref(description), *addresses, ctypes.c_int(torch.get_num_threads())):
        raise MemoryError("no memory for the attention of one document")


def causal_softmax_(scores: Tensor, offset: int, window: int | None, scale: float) -> None:
    """Compute the softmax of scale · scores over the keys that a query sees, in place; it is zero elsewhere.

    Args:
        scores: Products of queries and keys.
        offset: Index of the first query among the keys.
        window: Number of keys that a query sees at most, itself included.
        scale: Positive multiplier.

    Shapes:
        scores (N, queries, keys).
    """
    address = _scores("causal_softmax", "scores", scores, offset, scores)
    _call("causal_softmax", address, *scores.shape, offset, window or 0, float(scale))


def causal_softmax_backward_(weights: Tensor, grad: Tensor, offset: int, window: int | None, scale: float) -> None:
    """Overwrite the gradient of the weights with that of the unscaled scores. Shapes: both (N, queries, keys)."""
    name = "causal_softmax_backward"
    first = _scores(name, "weights", weights, offset, weights)
    second = _scores(name, "grad", grad, offset, weights)
    _call(name, first, second, *grad.shape, offset, window or 0, float(scale))


def _scores(name: str, argument: str, scores: Tensor, offset: int, like: Tensor) -> ctypes.c_void_p:
    """Return the address of scores, after checking that the keys include the queries.

    Shapes:
        scores (N, queries, keys) of fp32.

    Raises:
        ValueError: They do not.
    """
    _dtype_of(name, argument, like, 3)
    _, queries, keys = like.shape
    if not 0 <= offset <= keys - queries:
        raise _misfit(name, "offset", offset, f"0 to {keys - queries}, for {queries} queries among {keys} keys")
    return _address(name, argument, scores, torch.float32, like.shape)


def score_rows_(logits: Tensor, bias: Tensor | None, labels: Tensor, outputs: list[Tensor], needs_grad: bool) -> None:
    """Write log-probability, entropy and top-1 of every row; their gradient overwrites the logits.

    Shapes:
        logits (N, V), bias (V) of fp32, labels (N) of int64 from 0 to V - 1, outputs three of (N) of fp32.
    """
    name, dtype = "score_rows", _dtype_of("score_rows", "logits", logits, 2)
    rows, vocabulary = logits.shape
    places = _address(name, "labels", labels, torch.int64, (rows,))
    if rows:
        low, high = (int(item) for item in torch.aminmax(labels))
        if low < 0 or high >= vocabulary:
            raise _misfit(name, "labels", f"{low} to {high}", f"0 to {vocabulary - 1}")
    if len(outputs) != 3:
        raise _misfit(name, "outputs", len(outputs), "three")
    _call(
        name,
        _address(name, "logits", logits, dtype, logits.shape),
        None if bias is None else _address(name, "bias", bias, torch.float32, (vocabulary,)),
        places,
        *(_address(name, "outputs", output, torch.float32, (rows,)) for output in outputs),
        rows, vocabulary, bool(needs_grad), _is_wide(dtype),
    )  # fmt: skip


def from_4bit_(packed: Tensor, code: Tensor, scales: Tensor, weights: Tensor) -> None:
    """Dequantise 4-bit weights: `code[index] * scale` of the block, rounded to bf16.

    Shapes:
        packed (N / 2) of uint8, the first of two weights in the high half; code (16) and scales (blocks) of fp32;
        weights of N elements of bf16, N / blocks a multiple of 32. Tensors of more dimensions are read row by row.
    """
    name, count, blocks = "from_4bit", weights.numel(), scales.numel()
    if (blocks and count % (32 * blocks)) or (count and not blocks) or packed.numel() * 2 != count:
        found = f"{packed.numel():,} bytes, {blocks:,} scales, {count:,} weights"
        raise _misfit(name, "sizes", found, "two weights a byte, and a multiple of 32 for each scale")
    _call(
        name,
        _address(name, "packed", packed, torch.uint8, packed.shape),
        _address(name, "code", code, torch.float32, (16,)),
        _address(name, "scales", scales, torch.float32, scales.shape),
        _address(name, "weights", weights, torch.bfloat16, weights.shape),
        blocks, count // max(1, blocks),
    )  # fmt: skip
