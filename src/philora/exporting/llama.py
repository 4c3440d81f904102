"""Read an export with llama.cpp through its Python package, as a second reader. The package is optional.

It runs in a process of its own: a build for another processor, such as a cached wheel in a home folder that several
machines share, ends its process with SIGILL.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from philora.errors import ModelError, fault

_PROGRAM = Path(__file__).with_name("llama_process.py")


class Reading(NamedTuple):
    """Result of llama.cpp for a file.

    Attributes:
        tokens: Token ids of every text.
        logits: Logits of every row of token ids, in fp32. Shape of each: (T, V).
    """

    tokens: list[list[int]]
    logits: list[Tensor]


class Unreadable(Exception):
    """llama.cpp could not be run on this machine, so the file could not be checked with it."""


def available() -> bool:
    """Return whether the package is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def reader_name() -> str:
    """Return the reader's name in messages."""
    return f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"


def read(
    model: Path, lora: Path | None, texts: Sequence[str], rows: Sequence[Sequence[int]], *, add_bos: bool
) -> Reading:
    """Tokenise texts and compute logits of rows of token ids with llama.cpp, on the CPU, in a separate process.

    Raises:
        ModelError: llama.cpp refuses a file.
        Unreadable: The process crashed or could not start; the message names the cause and what to do.
    """
    with tempfile.TemporaryDirectory(prefix="philora-llama-") as temporary:
        folder = Path(temporary)
        job = {
            "model": str(model),
            "lora": str(lora) if lora is not None else None,
            "context": max(len(row) for row in rows),
            "texts": list(texts),
            "rows": [list(row) for row in rows],
            "add_bos": add_bos,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        # -P: modules in this folder must not shadow installed packages.
        command = [sys.executable, "-P", str(_PROGRAM), temporary]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            raise Unreadable(_why(done.returncode, done.stderr))
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        if "refused" in answer:
            raise ModelError(fault(str(lora or model), "content", answer["refused"], "a file that llama.cpp reads"))
        logits = [torch.from_numpy(np.load(folder / f"{index}.npy")) for index in range(len(rows))]
        return Reading(answer["tokens"], logits)


def _why(code: int, stderr: str) -> str:
    """Return how the process ended."""
    if code >= 0:
        last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")
        return f"{reader_name()} ended with exit code {code}: {last[:200]}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    remedy = "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
    why = f"it was built for another processor. Build it here: {remedy}" if name == "SIGILL" else "try another release"
    return f"{reader_name()} crashed with {name}; {why}"


def check_tokens(got: Sequence[Sequence[int]], written: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
    """Check that llama.cpp makes the same tokens from the same texts; `rows`, the tokenizer's, may end before the text.

    Raises:
        ModelError: They differ.
    """
    for text, ids, want in zip(written, got, rows, strict=True):
        found = list(ids)[: len(want)]
        if found != list(want):
            pairs = enumerate(zip(found, want, strict=False))
            index = next((index for index, pair in pairs if pair[0] != pair[1]), len(found))  # or it ends too early
            window = slice(max(0, index - 2), index + 3)
            expected = f"the tokenizer's {list(want)[window]} at token {index} of {text[:40]!r}"
            raise ModelError(
                fault("export to gguf", "tokens in llama.cpp", found[window], expected, "Nothing was written")
            )
