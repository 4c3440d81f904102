"""Find the entry of the troubleshooting page for an error, and its text.

Below each heading of the page a `text` block quotes the messages of the entry, with `…` for the parts that vary. The
page is part of the wheel, so that `philora explain` works offline.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from philora.errors import ConfigError, fault, nearest

_HEADING = re.compile(r"^### (?P<title>.+?) \{#(?P<name>[a-z-]+)\}\n", re.MULTILINE)
_MESSAGES = re.compile(r"\n```text\n(.*?)^```\n", re.DOTALL | re.MULTILINE)


class Entry(NamedTuple):
    """One entry of the page: its anchor, its title, the messages it quotes, and its text."""

    name: str
    title: str
    forms: tuple[str, ...]
    text: str


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Return all entries in the order of the page."""
    packaged = resources.files("philora") / "troubleshooting.md"
    page = packaged if packaged.is_file() else Path(__file__).parents[3] / "docs" / "troubleshooting.md"  # a checkout
    text = page.read_text(encoding="utf-8")
    found = list(_HEADING.finditer(text))
    ends = [item.start() for item in found[1:]] + [len(text)]
    result = []
    for heading, end in zip(found, ends, strict=True):
        body = re.split(r"^## ", text[heading.end() : end], flags=re.MULTILINE)[0]
        quoted = _MESSAGES.match(body)
        forms = tuple(quoted[1].splitlines()) if quoted else ()
        said = body[quoted.end() :] if quoted else body
        said = re.sub(r"^<!-- .*? -->\n", "", said, flags=re.MULTILINE)
        result.append(Entry(heading["name"], heading["title"], forms, said.strip()))
    return tuple(result)


def entry_of(message: str) -> Entry | None:
    """Return the entry whose quoted message fits best, which is the one with the longest fixed text.

    Args:
        message: The message as printed; the first of several faults counts. An error that is not philora's starts with
            the name of its class, as Python prints it.
    """
    lines = message.strip().splitlines() or [""]
    first = lines[1] if re.fullmatch(r"\d+ faults:", lines[0]) and len(lines) > 1 else lines[0]
    first = first.strip().removesuffix(".")
    fitting = [
        (sum(map(len, form.split("…"))), entry)
        for entry in entries()
        for form in entry.forms
        if _pattern(form).match(first)
    ]
    return max(fitting, key=lambda item: item[0])[1] if fitting else None


def entry_named(name: str) -> Entry:
    """Return the entry with a name.

    Raises:
        ConfigError: There is none.
    """
    known = {entry.name: entry for entry in entries()}
    if name not in known:
        raise ConfigError(fault("explain", "entry", name, f"one of {', '.join(known)}", nearest(name, known)))
    return known[name]


@functools.cache
def _pattern(form: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(glob.escape(form).replace("…", "*")))
