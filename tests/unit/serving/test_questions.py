"""Held-out questions that the chat page offers."""

from __future__ import annotations

import json

from philora.serving.questions import held_out_questions


def row(*turns, **more):
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns], **more}) + "\n"


def test_questions_are_short_distinct_and_not_trained_on(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {name_or_path: nano}\n")
    (tmp_path / "run.json").write_text("{}")
    assert held_out_questions(str(tmp_path)) == []
    lines = [row(("system", "s"), ("user", "One? "), ("assistant", "a")), row(("user", "One?"), ("assistant", "b"))]
    lines += [row(("user", "Trained?"), ("assistant", "a"), in_training=True), row(("user", "x" * 300)), "torn {"]
    lines += [row(("assistant", "Hello")), row(("user", "Two?")), row(("user", "Three?"))]
    (tmp_path / "held_out.jsonl").write_text("".join(lines))
    assert held_out_questions(str(tmp_path), most=2) == ["One?", "Two?"]
    assert held_out_questions(str(tmp_path / "adapter"), most=9) == ["One?", "Two?", "Three?"]


def test_an_adapter_in_no_run_has_none(tmp_path):
    assert held_out_questions(str(tmp_path / "nowhere")) == []
