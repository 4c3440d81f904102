"""Render a chat template within limits; `untrusted.py` starts this file as a process.

It imports nothing of philora, so that it starts in a fifth of a second. The Jinja environment is that of transformers.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES, CPU_SECONDS = 2 << 30, 10


class Generation(Extension):
    """Render the text between `generation` and `endgeneration` unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def parse(self, parser: Any) -> Any:
        """Return the statements inside the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def conversations() -> list[list[dict[str, str]]]:
    """Return a short conversation, one with a system prompt, a long message, and one of many turns."""
    user, assistant = ({"role": role, "content": "Hello."} for role in ("user", "assistant"))
    long = {"role": "user", "content": "words " * 2000}
    return [
        [user, assistant],
        [{"role": "system", "content": "Be brief."}, user, assistant, user],
        [long, assistant],
        [user, assistant] * 100,
    ]


def limit() -> None:
    """Limit this process's memory and time, if the system supports it."""
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))


def refuse(message: str) -> NoReturn:
    """Raise the error with which a template refuses a conversation."""
    raise jinja2.TemplateError(message)


def main() -> None:
    """Render the template in the JSON of standard input, with its special tokens.

    Raises:
        MemoryError: It takes more memory than the limit.
    """
    given = json.load(sys.stdin)
    limit()
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": datetime.datetime.now().strftime}
    try:
        template = environment.from_string(given["template"])
        for messages in conversations():
            # A template that refuses or does not know a message is reported when the data is read.
            with contextlib.suppress(jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError):
                template.render(messages=messages, add_generation_prompt=True, **given["tokens"])
    except jinja2.TemplateError:
        pass


if __name__ == "__main__":
    main()
