"""What stands in a block of the documents works: files are written, commands run, Python is executed, in order.

A hub model is replaced by the bundled one and a hub dataset by the bundled help desk, since nothing here needs the
network; a run has two steps. Commands of other programs are looked at for spelling only, by a person.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from philora.config import load_config

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
MODELS = re.compile(r"microsoft/Phi-[\w.-]+")
DATASETS = {"HuggingFaceH4/ultrachat_200k": "helpdesk"}
SHORT = {"max_steps": 2, "save_steps": 1, "eval_strategy": "no", "max_length": 128}
PAGES = ["docs/quickstart.md", "docs/data.md", "docs/coming-from.md"]


def blocks(page):
    """(language, title, text) of each block; one that the pattern misses would stay untested."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = BLOCK.findall(text)
    assert len(found) == text.count("\n```") // 2, f"{page}: a block without a language, or not closed"
    return found


def local(text):
    """The same without the network."""
    text = MODELS.sub("nano", text)
    for name, here in DATASETS.items():
        text = text.replace(name, here)
    return text


def write(title, text):
    """A file of the page; a configuration gets few steps."""
    if title.endswith(".yaml"):
        settings = yaml.safe_load(local(text))
        load_config(settings)  # as it stands
        settings["training_config"] = settings.get("training_config", {}) | SHORT
        settings["evaluation"] = settings.get("evaluation", {}) | {"generate": 2, "max_new_tokens": 4}
        text = yaml.safe_dump(settings)
    Path(title).write_text(text, encoding="utf-8")


def play(page, cli, tmp_path, monkeypatch):
    """Everything on a page, from top to bottom."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, title, text in blocks(page):
        if title:
            write(title, text)
        elif language == "yaml":
            load_config(yaml.safe_load(local(text)))
        elif language == "python":
            exec(compile(local(text), page, "exec"), names)
        elif language == "sh":
            for line in filter(None, map(str.strip, text.splitlines())):
                words = shlex.split(line, comments=True)
                if words[:1] == ["philora"]:
                    answer = cli(*map(local, words[1:]))
                    assert answer.code == 0, f"{page}: {line}\n{answer.err}"
        else:
            assert language in ("text", "json"), f"{page}: nothing runs {language}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_work(page, cli, tmp_path, monkeypatch):
    play(page, cli, tmp_path, monkeypatch)


def test_a_block_that_does_not_work_is_found(cli, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    for text in ("```sh\nphilora check missing.yaml\n```\n", "```sh\nphilora --no-such\n```\n"):
        page.write_text(f"\n{text}")
        with pytest.raises(AssertionError, match=r"philora"):
            play(page, cli, tmp_path, monkeypatch)
    page.write_text("\n```python\nimport philora\nphilora.no_such_name\n```\n")
    with pytest.raises(AttributeError, match="no_such_name"):
        play(page, cli, tmp_path, monkeypatch)
    page.write_text("\n```\nwhatever\n```\n")
    with pytest.raises(AssertionError, match="without a language"):
        play(page, cli, tmp_path, monkeypatch)
