"""Read the small files of a run: what is damaged is left out, and text stays whole."""

from __future__ import annotations

import json

import pytest

from philora.files.checkpoint import read_json, read_json_lines

LINE_ENDS = "a\u2028b\u2029c\x85d\x0ce\x1cf"


def test_a_text_with_unicodes_line_ends_stays_one_line(tmp_path):
    file = tmp_path / "answers.jsonl"
    entries = [{"text": LINE_ENDS}, {"text": "next"}]
    file.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\r\n" for entry in entries), encoding="utf-8")
    assert "\u2028" in file.read_text(encoding="utf-8"), "the test could not fail"
    assert read_json_lines(file) == entries


def test_what_is_no_whole_object_is_left_out(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"step": 1}\n\n[2]\n3\n{"step": 2', encoding="utf-8")
    assert read_json_lines(file) == [{"step": 1}]
    assert read_json_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("text", ["{", "\udcff", "[" * 100_000])
def test_a_damaged_file_is_a_warning(tmp_path, caplog, text):
    file = tmp_path / "results.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert read_json(file) == {}
    assert f"{file} cannot be read and is ignored" in caplog.text
