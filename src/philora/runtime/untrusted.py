"""Guard against downloaded tokenizers: a panic of the library, or a template that takes all memory, is an error."""

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
    """Turn a panic of the tokenizers library, which is no `Exception`, into a ValueError that names the file.

    Raises:
        ValueError: The library panicked.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException" or type(error) is Exception:
            raise ValueError(f"{where}: {str(error)[:300]}") from error
        raise


def check_tokenizer(tokenizer: Any) -> None:
    """Encode and decode a few texts and render the chat template, to find errors early.

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
    """Render a chat template in a process with limits on memory and time; `tokens` are its special ones, as JSON.

    Cost:
        A fifth of a second, once per template.

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
        return  # an error of this check itself, such as an incompatible jinja2, is not the template's
    raise ValueError(f"{name}: rendering ordinary conversations takes more than 2 GiB of memory or 10 s of time")
