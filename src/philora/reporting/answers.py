"""Prepare held-out questions with the answers of base and adapter for the pages, which filter and sort them."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from philora.reporting.formatting import mapping
from philora.reporting.run_record import Run

MOST_ANSWERS = 500
"""Most answers in a page: with more it would be too large to open on a phone."""

ANOTHER_ANSWER = 0.5
"""Share of common words below which an answer counts as a different one, without underlined words."""

OPEN_ANSWERS = 3
"""Answers that are unfolded when the page opens."""


def answer_lines(answers: Iterable[Mapping[str, Any]]) -> str:
    """Return answers as the lines of `answers.jsonl`."""
    return "".join(f"{json.dumps(answer, ensure_ascii=False)}\n" for answer in answers)


def similarity(answer: str, reference: str) -> float:
    """Return the share of words, from 0 to 1, that an answer has in common with its reference in the same order."""
    words, wanted = answer.split(), reference.split()
    if words == wanted:
        return 1.0
    return difflib.SequenceMatcher(a=wanted, b=words, autojunk=False).ratio()


def marked(answer: str, reference: str) -> list[tuple[str, bool]]:
    """Return an answer in pieces, with whether each differs from the reference.

    An answer that shares less than `ANOTHER_ANSWER` of its words with the reference is one unmarked piece. An empty
    answer has none.
    """
    if not answer.strip():
        return []
    words, wanted = re.findall(r"\S+\s*", answer), re.findall(r"\S+\s*", reference)
    matcher = difflib.SequenceMatcher(a=[w.strip() for w in wanted], b=[w.strip() for w in words], autojunk=False)
    if answer.split() == reference.split() or matcher.ratio() < ANOTHER_ANSWER:
        return [(answer, False)]
    pieces = []
    for kind, _, _, start, stop in matcher.get_opcodes():
        text = "".join(words[start:stop])
        end = len(text.rstrip())
        pieces += [(text[:end], kind != "equal"), (text[end:], False)]
    return [(text, differs) for text, differs in pieces if text]


def answers_view(run: Run) -> dict[str, Any] | None:
    """Return the answers of a run for the template; None if there are none."""
    if not run.answers:
        return None
    shown = [_entry(answer, index) for index, answer in enumerate(run.answers[:MOST_ANSWERS])]
    return {
        "entries": shown,
        "total": len(run.answers),
        "counts": {
            "all": len(shown),
            "matches": sum(entry["matched"] is True for entry in shown),
            "differs": sum(entry["matched"] is not True for entry in shown),
            "worse": sum(entry["worse"] for entry in shown),
        },
    }


def _entry(answer: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return a question as bubbles, its answers, and the values that it is filtered and sorted by."""
    reference = text_of(answer.get("reference"))
    base = _side(answer, "base", reference) | {"name": "Base"}
    adapter = _side(answer, "adapter", reference) | {"name": "With adapter"}
    return {
        "prompt": prompt_of(answer),
        "title": _title(answer),
        "reference": reference,
        "answers": [base, adapter],
        "matched": adapter["matched"],
        "worse": adapter["score"] < base["score"],
        "score": adapter["score"],
        "gain": round(adapter["score"] - base["score"], 4),
        "index": index,
        "open": index < OPEN_ANSWERS,
    }


def _side(answer: Mapping[str, Any], who: str, reference: str) -> dict[str, Any]:
    text = text_of(answer.get(who))
    matched = answer.get(f"{who}_matched")
    score = 1.0 if matched is True else round(similarity(text, reference), 4)
    return {
        "who": who,
        "pieces": marked(text, reference),
        "matched": matched if isinstance(matched, bool) else None,
        "another": bool(text.strip()) and score < ANOTHER_ANSWER,
        "score": score,
    }


def prompt_of(answer: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the messages of a question as text."""
    return [
        {"role": str(mapping(message).get("role", "")), "content": text_of(mapping(message).get("content"))}
        for message in answer.get("prompt") or []
    ]


def _title(answer: Mapping[str, Any]) -> str:
    """Return the beginning of the last question."""
    asked = [message["content"] for message in prompt_of(answer) if message["role"] == "user"]
    text = " ".join((asked or [""])[-1].split())
    return text if len(text) <= 120 else f"{text[:120].rstrip()}…"


def text_of(content: Any) -> str:
    """Return the text of a message, or the texts of its parts."""
    if isinstance(content, list):
        return " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def compared_answers(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any] | None:
    """Return the questions that at least two runs answered, with their answers side by side; None if there are none."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for place, run in enumerate(runs):
        for answer in run.answers:
            key = json.dumps([prompt_of(answer), text_of(answer.get("reference"))])
            found.setdefault(key, {}).setdefault(place, answer)
    shared = [answers for answers in found.values() if len(answers) > 1]
    entries = [_compared_entry(answers, names, index) for index, answers in enumerate(shared[:MOST_ANSWERS])]
    if not entries:
        return None
    return {
        "entries": entries,
        "total": len(shared),
        "counts": {
            "all": len(entries),
            "matches": sum(entry["matches"] == len(entry["answers"]) for entry in entries),
            "differs": sum(0 < entry["matches"] < len(entry["answers"]) for entry in entries),
            "none": sum(entry["matches"] == 0 for entry in entries),
        },
    }


def _compared_entry(answers: Mapping[int, Mapping[str, Any]], names: Sequence[str], index: int) -> dict[str, Any]:
    one = next(iter(answers.values()))
    reference = text_of(one.get("reference"))
    sides = [
        _side(answer, "adapter", reference) | {"name": names[place], "style": f"run-{place}"}
        for place, answer in sorted(answers.items())
    ]
    scores = [side["score"] for side in sides]
    return {
        "prompt": prompt_of(one),
        "title": _title(one),
        "reference": reference,
        "answers": sides,
        "matches": sum(side["matched"] is True for side in sides),
        "score": max(scores),
        "gain": round(max(scores) - min(scores), 4),
        "index": index,
        "open": index < 1,
    }
