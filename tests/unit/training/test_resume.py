"""What a run records of a model on the Hub, and what a resumed run compares with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import file_download

from philora.configuration.config import load_config
from philora.errors import ConfigError
from philora.training import resume

COMMITS = ("a" * 40, "b" * 40)


def cached(cache: Path, commit: str) -> None:
    """Write the Hub's cache as a download of a model at `commit` leaves it."""
    folder = cache / "models--org--name"
    (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)


@pytest.fixture
def facts(tmp_path, monkeypatch):
    monkeypatch.setattr(file_download.constants, "HF_HUB_CACHE", str(tmp_path))

    def of(commit: str | None) -> dict:
        if commit is not None:
            cached(tmp_path, commit)
        return {"model": resume._files("org/name", None, "config.json"), "computes": {}}

    return of


def compared(then: dict, now: dict) -> None:
    config = load_config({"model": {"name_or_path": "org/name"}, "data": {"train": "org/rows"}})
    continued = resume.Continued(checkpoint=None, facts=then, forced=False, changed=False, config=config)
    resume.check_facts(continued, now, Path("run"))


def test_the_commit_of_a_model_on_the_hub_is_recorded(facts):
    assert facts(None)["model"] == {"id": "org/name", "commit": None}
    assert facts(COMMITS[0])["model"]["commit"] == COMMITS[0]


def test_another_commit_is_refused(facts):
    then = facts(COMMITS[0])
    compared(then, facts(COMMITS[0]))
    with pytest.raises(ConfigError, match=rf"model\.commit='{COMMITS[1]}'.*{COMMITS[0]}"):
        compared(then, facts(COMMITS[1]))


def test_a_record_without_a_commit_is_no_difference(facts):
    compared(facts(None), facts(COMMITS[0]))
