"""llama.cpp through its Python package, as a second reader of what is written; it may be missing."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from philora.errors import ModelError, fault


def available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def reader_name() -> str:
    """What a message calls it."""
    return f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"


@contextlib.contextmanager
def opened(model: Path, lora: Path | None = None, *, context: int) -> Iterator[Any]:
    """A model with an adapter on the CPU.

    Yields:
        `llama_cpp.Llama`.

    Raises:
        ModelError: llama.cpp refuses a file.
    """
    import llama_cpp

    try:
        loaded = llama_cpp.Llama(
            str(model),
            lora_path=str(lora) if lora is not None else None,
            n_ctx=context,
            n_gpu_layers=0,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,  # a cache in f16 would be the largest difference
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
        )
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(fault(str(lora or model), "content", str(error), "a file that llama.cpp reads")) from error
    try:
        yield loaded
    finally:
        loaded.close()


def row_logits(loaded: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits for each row of token ids. Shape of each: (T, V)."""
    found = []
    for row in rows:
        loaded.reset()
        loaded.eval(list(row))
        found.append(torch.from_numpy(np.array(loaded.scores[: len(row)], dtype=np.float32)))
    return found


def check_tokens(loaded: Any, written: Sequence[str], rows: Sequence[Sequence[int]], *, chat: bool) -> None:
    """llama.cpp makes the same tokens of the same texts.

    Raises:
        ModelError: Of one of them it does not.
    """
    for text, want in zip(written, rows, strict=True):
        got = loaded.tokenize(text.encode(), add_bos=not chat, special=True)[: len(want)]
        if got != list(want):
            pairs = enumerate(zip(got, want, strict=False))
            place = next((index for index, pair in pairs if pair[0] != pair[1]), len(got))  # or it ends too early
            expected = f"the tokenizer's {list(want)[max(0, place - 2) : place + 3]} at token {place} of {text[:40]!r}"
            found = got[max(0, place - 2) : place + 3]
            raise ModelError(fault("export to gguf", "tokens in llama.cpp", found, expected, "Nothing was written"))
