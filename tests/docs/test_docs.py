"""What the documents say is what the code has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import philora
from philora.config import load_config, reference

ROOT = Path(__file__).parents[2]


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)


def test_every_setting_is_documented():
    assert reference() in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ["README.md", "docs/loralib.md"])
def test_yaml_and_json_blocks_are_valid(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conversations.jsonl").write_text("{}")
    for block in blocks(path, "yaml"):
        load_config(yaml.safe_load(block))
    for block in blocks(path, "python"):
        compile(block, path, "exec")


def test_the_readme_names_the_commands_that_exist():
    from philora.cli import app

    named = set(re.findall(r"^\| `philora (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {each.name or each.callback.__name__ for each in app.registered_commands}


def test_the_version_is_one():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{philora.__version__}"' in project


def test_links_lead_somewhere():
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in Path(philora.__file__).parent.iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert f"`{path.name}`" in text, path.name


def test_the_site_builds_without_a_warning(tmp_path):
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    built = subprocess.run(
        mkdocs, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    assert "philora.train" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


def test_every_page_is_in_the_site():
    named = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
