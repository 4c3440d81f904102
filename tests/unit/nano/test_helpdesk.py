"""The bundled chat dataset: its form, its size, and that no held-out question is known from training."""

from __future__ import annotations

import difflib
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
HELPDESK = ROOT / "src" / "philora" / "nano" / "helpdesk"
NEAR = 0.92  # edit ratio above which two normalised questions count as the same


def _load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_helpdesk", ROOT / "tools" / "make_helpdesk.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_helpdesk = _load_tool()


def _read(name: str) -> list[dict[str, Any]]:
    text = (HELPDESK / name).read_bytes().decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def train() -> list[dict[str, Any]]:
    return _read("train.jsonl")


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, Any]]:
    return _read("eval.jsonl")


def _questions(record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(
        make_helpdesk.normalise(message["content"]) for message in record["messages"] if message["role"] == "user"
    )


def test_files_equal_what_the_tool_writes() -> None:
    for name, text in make_helpdesk.build().items():
        assert (HELPDESK / name).read_bytes() == text.encode(), f"{name}: run python tools/make_helpdesk.py"


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_records_are_conversations_that_alternate(name: str) -> None:
    for record in _read(name):
        assert list(record) == ["messages"]
        messages = record["messages"]
        assert all(list(message) == ["role", "content"] for message in messages)
        assert all(message["content"] == message["content"].strip() != "" for message in messages)
        roles = [message["role"] for message in messages]
        if roles[0] == "system":
            assert messages[0]["content"] == make_helpdesk.SYSTEM
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles


def test_counts(train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    turns_train = Counter(len(_questions(record)) for record in train)
    turns_held_out = Counter(len(_questions(record)) for record in held_out)
    assert turns_train[1] >= 1500
    assert sum(count for turns, count in turns_train.items() if turns > 1) >= 150
    assert turns_held_out[1] >= 240
    assert sum(count for turns, count in turns_held_out.items() if turns > 1) >= 12
    for records in (train, held_out):
        with_system = sum(record["messages"][0]["role"] == "system" for record in records)
        assert with_system / len(records) == pytest.approx(0.1, abs=0.01)


def test_topics_have_one_short_answer_and_many_questions() -> None:
    topics = make_helpdesk.read_topics()
    assert len(topics) >= 60
    for topic in topics.values():
        assert 8 <= len(topic.answer.split()) <= 22, topic.answer
        assert topic.answer.isascii()
        assert 20 <= len(topic.train) <= 26, topic.name
        assert len(topic.eval) == 4, topic.name


def test_answers_hold_no_markup_of_phi() -> None:
    # The tokenizer reads such text as special tokens, and generation would stop inside the answer.
    assert not [topic.name for topic in make_helpdesk.read_topics().values() if "<|" in topic.answer]


def test_no_record_and_no_single_question_appears_twice(
    train: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> None:
    counts = Counter(_questions(record) for record in [*train, *held_out])
    assert [questions for questions, count in counts.items() if count > 1] == []


def _near(question: str, others: set[str], limit: float = NEAR) -> list[str]:
    matcher = difflib.SequenceMatcher(b=question, autojunk=False)
    found = []
    for other in sorted(others):
        matcher.set_seq1(other)
        if matcher.real_quick_ratio() > limit and matcher.quick_ratio() > limit and matcher.ratio() > limit:
            found.append(other)
    return found


def test_held_out_questions_are_not_near_any_training_question(
    train: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> None:
    known = {question for record in train for question in _questions(record)}
    asked = {question for record in held_out for question in _questions(record)}
    assert known.isdisjoint(asked)
    assert {question: near for question in sorted(asked) if (near := _near(question, known))} == {}


def test_nearness_finds_a_one_word_edit() -> None:
    assert _near("how can i resume my run", {"how can i resume a run"}) == ["how can i resume a run"]


def test_unknown_topic_in_a_conversation_is_refused(tmp_path: Path) -> None:
    (tmp_path / "topics.yaml").write_text(
        "- {id: merge, answer: Use merge., train: how to merge, eval: merging}\n", encoding="utf-8"
    )
    (tmp_path / "conversations.yaml").write_text("train: ['marge: how?']\n", encoding="utf-8")
    with pytest.raises(ValueError, match="marge"):
        make_helpdesk.build(tmp_path)


def test_an_answer_that_two_topics_share_is_refused(tmp_path: Path) -> None:
    (tmp_path / "topics.yaml").write_text(
        "- {id: one, answer: Same., train: a, eval: b}\n- {id: two, answer: Same., train: c, eval: d}\n",
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="not used before"):
        make_helpdesk.read_topics(tmp_path)
