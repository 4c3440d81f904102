"""What the documents say is what the code has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import philora
from philora.configuration.writing import reference

ROOT = Path(__file__).parents[2]


def test_every_setting_is_documented():
    assert reference() in (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_the_pages_name_commands_that_exist():
    from philora.cli.commands import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.name in ("CHANGELOG.md",):
            continue
        named = set(re.findall(r"`philora ([a-z]+)\b", text))
        assert named <= known, page.name


def test_the_first_screen_of_the_readme_names_both_commands():
    first_screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:20]
    assert {"make demo", "make test"} <= {line.partition("#")[0].strip() for line in first_screen}


def test_the_version_is_one():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{philora.__version__}"' in project


PAGES = [path for folder in (".", "docs", "examples", "benchmarks") for path in sorted((ROOT / folder).glob("*.md"))]


def anchors(path):
    """Names that a link to a page may end in."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        named = re.search(r"\{#([\w-]+)\}$", heading)
        yield named[1] if named else re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def broken_links(path):
    """Links of a page to files or headings that are not there, and addresses that are none."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            if not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[^\s<>]*)?", target):
                yield target
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            yield target


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert not list(broken_links(path))


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "b.md").write_text("# There is one\n### Named {#name}\n")
    page = tmp_path / "a.md"
    page.write_text("[a](b.md) [b](b.md#there-is-one) [c](b.md#name) [d](https://example.org/x) [e](#f)\n# F\n")
    assert not list(broken_links(page))
    page.write_text("[a](c.md) [b](b.md#no) [c](#no) [d](http:/x) [e](https://x y)\n")
    assert list(broken_links(page)) == ["c.md", "b.md#no", "#no", "http:/x"]


def test_the_commands_page_is_that_of_the_command_line():
    from tools.commands import commands, filled

    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == filled(page), "run: python tools/commands.py"
    assert sorted(re.findall(r"<!-- help: (\w+) -->", page)) == sorted(commands())
    assert sorted(re.findall(r"^### philora (\w+)$", page, re.MULTILINE)) == sorted(commands())


def test_the_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in Path(philora.__file__).parent.iterdir():
        if path.suffix == ".py" and not path.name.startswith("__"):
            assert f"`{path.name}`" in text, path.name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    mkdocs = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path / "site")]
    built = subprocess.run(
        mkdocs, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert built.returncode == 0, built.stderr
    assert "philora.train" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


def test_every_public_name_has_its_docstring_in_the_site():
    named = re.findall(r"^::: philora\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(philora.__all__) <= set(named)


def test_every_page_is_in_the_site():
    named = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_architecture_says_why_each_dependency_is_there():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Why each dependency")[2]
    listed = {each for row in re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE) for each in re.findall(r"[\w-]+", row)}
    assert {re.match(r"[\w-]+", each)[0] for each in needed} <= listed


@pytest.mark.slow
def test_the_page_on_machines_is_what_the_planner_computes():
    from tools import hardware_table

    assert hardware_table.PAGE.read_text(encoding="utf-8") == hardware_table.page(), (
        "run python tools/hardware_table.py"
    )


def test_the_planner_and_the_page_on_machines_agree_on_one_model():
    """The quick form of the test above: one row of the table."""
    from tools import hardware_table

    mini = hardware_table.case("phi-3-mini", "nf4", "cpu")
    cells = " | ".join(hardware_table.cell(mini, size) for size in hardware_table.LAPTOPS)
    lines = hardware_table.PAGE.read_text(encoding="utf-8").partition("### On a laptop")[2].splitlines()
    (line,) = (line for line in lines if line.startswith("| phi-3-mini | nf4 |"))
    assert line.endswith(f"GB | {cells} |")


def test_the_container_file_copies_what_exists_and_installs_extras_that_exist():
    import tomllib

    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()), line
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"/philora\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in included["force-include"]:
        assert name in text, f"the wheel needs {name}"


def test_the_site_has_the_colours_and_fonts_of_the_report():
    report = (ROOT / "src" / "philora" / "templates" / "report.css").read_text(encoding="utf-8")
    site = (ROOT / "docs" / "stylesheets" / "philora.css").read_text(encoding="utf-8")
    for colour in set(re.findall(r"#[0-9a-f]{6}", site)):
        assert colour in report, colour
    for name, value in re.findall(r"--(sans|mono|serif): ([^;]+);", report):
        assert value in site, name
