"""Every kind of record file is read, said to be unread in part, or refused: nothing in it is lost without a word."""

import dataclasses

import pytest

from tests.data_kinds import KINDS, lost, result
from tools.data_kinds import MARKED, PAGE, filled


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return {name: result(kind, tmp_path_factory.mktemp("kind")) for name, kind in KINDS.items()}


def test_the_table_has_many_kinds():
    assert len(KINDS) >= 60
    assert all(kind.refused or kind.labels for kind in KINDS.values())


@pytest.mark.parametrize("name", list(KINDS))
def test_each_kind(results, name):
    kind, found = KINDS[name], results[name]
    if kind.refused:
        assert kind.refused in found.refused
        return
    assert not found.refused
    assert found.labels == kind.labels
    for words in kind.said:
        assert any(words in notice for notice in found.notices), found.notices
    if not kind.said:
        assert not found.notices
    assert lost(kind, found) == []


@pytest.mark.parametrize("name", ["dolly", "turns with a score", "a folder with notes", "JSON, lists named as splits"])
def test_a_kind_whose_unread_texts_are_not_named_is_found(results, name):
    silent = dataclasses.replace(results[name], unread_fields=(), unread_parts=())
    assert lost(KINDS[name], silent)
    shorter = dataclasses.replace(results[name], texts=())
    assert lost(KINDS[name], shorter)


def test_the_page_has_this_table(results):
    page = PAGE.read_text(encoding="utf-8")
    assert MARKED.search(page)
    assert filled(page, results) == page, "run python tools/data_kinds.py"
