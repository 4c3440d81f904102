"""Error classes and the one form that every message has.

A message reads `<where>: <name>=<value> - expected <rule>. <what to do>.`; `fault` writes it. Errors that
come in groups (configuration, target matching, adapter loading) carry one fault a line, so that a person
sees all of them at once.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence


class PhiloraError(Exception):
    """Base of all errors that philora raises on purpose; the command line prints it without a traceback.

    `exit_code` is 2 for usage, configuration or data, 1 for a run that failed.
    """

    exit_code = 2


class ConfigError(PhiloraError, ValueError):
    """A configuration file, dict or override is wrong; nothing has been loaded or written."""


class DataError(PhiloraError, ValueError):
    """A dataset cannot be read or holds records that cannot be trained on."""


class TargetError(PhiloraError, ValueError):
    """A name in a LoraConfig matches nothing in the model, or matches something LoRA cannot adapt."""


class ModelError(PhiloraError, OSError):
    """A model or tokenizer cannot be loaded."""


class AdapterError(PhiloraError, ValueError):
    """An adapter or checkpoint file is missing, incomplete, or does not fit the model."""


class RunError(PhiloraError, RuntimeError):
    """A run failed after it had started."""

    exit_code = 1


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)`, cut in the middle when it is longer than `limit` characters."""
    text = repr(value)
    if len(text) <= limit:
        return text
    half = (limit - 3) // 2
    return f"{text[:half]}...{text[-half:]}"


def printable(text: str) -> str:
    """Text without control characters: what comes from data or a model must not move the cursor or set the terminal."""
    if text.isprintable():
        return text
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def fault(where: str, name: str, value: object, expected: str, todo: str = "") -> str:
    """Return a message: `<where>: <name>=<value> - expected <rule>. <what to do>.`

    Example:
        >>> fault("config.yaml", "peft_config.r", 0, "a whole number of at least 1", "Common values are 8 to 64")
        'config.yaml: peft_config.r=0 - expected a whole number of at least 1. Common values are 8 to 64.'
    """
    text = f"{where}: {name}={shorten(value)} - expected {expected.rstrip('.')}."
    if not todo:
        return text
    return f"{text} {todo}" if todo.endswith("?") else f"{text} {todo.rstrip('.')}."


def nearest(name: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?` when a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else ""


def one_per_line(faults: Sequence[str]) -> str:
    """Return the text of an error that reports several faults at once."""
    if len(faults) == 1:
        return faults[0]
    return f"{len(faults)} faults:\n" + "\n".join(f"  {item}" for item in faults)
