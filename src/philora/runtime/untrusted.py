"""Tokenizers from outside: one that panics, and a chat template that takes all memory, are errors like others."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_PROGRAM = Path(__file__).with_name("template_process.py")
_WALL_SECONDS = 120
_TEXTS = ("Hello", " two  spaces\n\nand lines ", "größer, 12345 and \U0001f600", "", "\x00\ufffd")


@contextlib.contextmanager
def panics_as_errors(where: str) -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is no `Exception`, into a ValueError.

    Args:
        where: What the message calls the file.

    Raises:
        ValueError: With what the library says.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException" or type(error) is Exception:
            raise ValueError(f"{where}: {str(error)[:300]}") from error
        raise


def check_tokenizer(tokenizer: Any) -> None:
    """Encode and decode a few texts, and render the chat template, before anything depends on them.

    Raises:
        ValueError: The tokenizer fails on ordinary text, or its template takes more than `template_process` allows.
    """
    with panics_as_errors("tokenizer.json"):
        for text in _TEXTS:
            tokenizer.decode(tokenizer(text)["input_ids"])
    template = tokenizer.chat_template
    named = template if isinstance(template, dict) else {"chat_template": template}
    tokens = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    for name, text in named.items():
        if isinstance(text, str):
            check_template(name, text, json.dumps(tokens, sort_keys=True))


@functools.lru_cache(maxsize=64)
def check_template(name: str, template: str, tokens: str) -> None:
    """Render a chat template in a process with bounds on memory and time.

    Args:
        name: What the message calls it.
        template: Jinja source.
        tokens: Special tokens as a JSON object, which templates write.

    Cost:
        A fifth of a second, once for every template.

    Raises:
        ValueError: It takes more than 2 GiB or 10 s for ordinary conversations.
    """
    given = json.dumps({"template": template, "tokens": json.loads(tokens)})
    command = [sys.executable, "-P", str(_PROGRAM)]
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_WALL_SECONDS)
    except subprocess.TimeoutExpired:
        done = None
    if done is not None and done.returncode == 0:
        return
    if done is not None and done.returncode == 1 and "MemoryError" not in done.stderr:
        return  # a fault of this check, such as a jinja2 that it does not know, is no fault of the template
    raise ValueError(f"{name}: rendering ordinary conversations takes more than 2 GiB of memory or 10 s of time")
