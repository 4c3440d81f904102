"""Choose conversations on which exports are compared: held-out ones of the run, and some general ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from transformers import PreTrainedTokenizerBase

TOKENS: Final = 128

_OWN: Final[Sequence[Sequence[Mapping[str, str]]]] = (
    (
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "What is the capital of Norway, and how many people live there?"},
        {"role": "assistant", "content": "Oslo is the capital of Norway; about 700,000 people live there."},
    ),
    (
        {"role": "user", "content": "Write a Python function that adds 1 to each element of a list."},
        {"role": "assistant", "content": "def add_one(xs):\n    return [x + 1 for x in xs]"},
        {"role": "user", "content": "And with numpy?"},
    ),
    ({"role": "user", "content": "Wie heißt der höchste Berg Österreichs? Antworte auf Deutsch, bitte."},),
    ({"role": "user", "content": "  Two spaces first,\n\nan empty line, 3.14 and `code --flag=1e-4`.  "},),
)


def conversations(run: Path | None) -> list[list[dict[str, str]]]:
    """Return held-out conversations of a run, with the reference answers, then philora's own."""
    found: list[list[dict[str, str]]] = []
    results = run / "results.json" if run is not None else None
    if results is not None and results.is_file():
        for sample in json.loads(results.read_text(encoding="utf-8")).get("samples") or []:
            answer = [{"role": "assistant", "content": sample["reference"]}] if sample.get("reference") else []
            found.append([*sample["prompt"], *answer])
    return found + [[dict(entry) for entry in talk] for talk in _OWN]


def texts(run: Path | None, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the conversations as the model reads them; without a chat template, the plain contents."""
    talks = conversations(run)
    if tokenizer.chat_template is None:
        return ["\n".join(entry["content"] for entry in talk) for talk in talks]
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    return [str(render(talk, add_generation_prompt=talk[-1]["role"] != "assistant")) for talk in talks]


def token_rows(written: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int = TOKENS) -> list[list[int]]:
    """Return the token ids of texts, each of at most `limit` tokens."""
    chat = tokenizer.chat_template is not None
    ids: list[list[int]] = tokenizer(list(written), add_special_tokens=not chat)["input_ids"]
    return [row[:limit] for row in ids]
