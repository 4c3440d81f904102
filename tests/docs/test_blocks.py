"""What stands in a block of the documents works: files are written, commands run, Python is executed, in order.

A hub model is replaced by the bundled one and a hub dataset by the bundled help desk, since nothing here needs the
network; a run has two steps. A block that cannot run here has a mark above it, `<!-- not run: why -->`, which nobody
sees; `NOT_RUN` counts them. What can be seen without running is looked at in every block.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from philora.cli.commands import _arguments, app
from philora.configuration.config import load_config

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r'(?:^<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.DOTALL | re.MULTILINE,
)
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "examples", "benchmarks")
    for path in (ROOT / folder).glob("*.md")
    if path.name != "CHANGELOG.md"
)
MODELS = re.compile(r"microsoft/Phi-[\w.-]+")
DATASETS = {"HuggingFaceH4/ultrachat_200k": "helpdesk"}
SHORT = {"max_steps": 2, "save_steps": 1, "eval_strategy": "no", "max_length": 128}
# Blocks that are not run, by page. One more is a decision: say in its mark what keeps it from running.
NOT_RUN = {
    "CONTRIBUTING.md": 1,
    "README.md": 1,
    "benchmarks/README.md": 1,
    "docs/chat.md": 1,
    "docs/evaluation.md": 4,
    "docs/hub.md": 1,
    "docs/loralib.md": 1,
    "docs/performance.md": 1,
    "docs/platforms.md": 2,
    "docs/processes.md": 2,
    "docs/quickstart.md": 1,
    "docs/serving.md": 4,
    "docs/troubleshooting.md": 1,
    "docs/tutorial.md": 1,
    "examples/README.md": 1,
}


class Block(NamedTuple):
    why: str
    language: str
    title: str
    text: str


def blocks(page):
    """The blocks of a page; one that the pattern misses would stay untested."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Block(*(each or "" for each in match)) for match in FENCE.findall(text)]
    assert len(found) == len(re.findall(r"^```", text, re.MULTILINE)) // 2, f"{page}: a block without a language"
    return found


def lines_of(block):
    """The commands of a block, each in words; continued lines are joined."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield line, words


def segments(words):
    """Words between pipes."""
    found = [[]]
    for word in words:
        if word == "|":
            found.append([])
        else:
            found[-1].append(word)
    return found


def local(text):
    """The same without the network."""
    text = MODELS.sub("nano", text)
    for name, here in DATASETS.items():
        text = text.replace(name, here)
    return text


def settings_of(text):
    """A configuration, or a part of one as it stands beside a whole one."""
    settings = yaml.safe_load(local(text).replace("OWNER/NAME", "owner/name"))
    settings.setdefault("data", {"train": "helpdesk"})
    return settings


# ------------------------------------------------------------------------------------------ without running


def look_at(page, block):
    """What can be seen of a block without running it."""
    if block.language == "python":
        compile(block.text, page, "exec")
    elif block.language == "json":
        try:
            json.loads(block.text)
        except ValueError:
            for line in block.text.splitlines():
                json.loads(line)
    elif block.language == "sh":
        group: Any = typer.main.get_command(app)
        for line, words in lines_of(block):
            for each in segments(words):
                if each[:1] != ["philora"]:
                    assert block.why or each[0] in ("printf", "jq"), f"{page}: what runs {line!r}? Mark the block."
                    continue
                name, *arguments = _arguments(each[1:])
                assert name in group.commands, f"{page}: {line}: no command {name}"
                try:
                    group.commands[name].make_context(name, list(arguments))
                except Exception as error:
                    raise AssertionError(f"{page}: {line}: {error}") from error
    else:
        assert block.language in ("text", "yaml"), f"{page}: nothing runs {block.language}"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_spelled_right(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        if block.title and block.language in ("json", "text"):
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    for block in blocks(page):
        look_at(page, block)
        if block.language == "yaml" and not block.why:
            load_config(settings_of(block.text))


def test_the_blocks_that_are_not_run_are_known():
    found = {page: [each.why for each in blocks(page) if each.why] for page in PAGES}
    print("\n".join(f"{page}: {why}" for page, reasons in found.items() for why in reasons))
    assert {page: len(reasons) for page, reasons in found.items() if reasons} == NOT_RUN
    for page, reasons in found.items():
        for named in re.findall(r"tests/[\w/]+\.py", " ".join(reasons)):
            assert (ROOT / named).is_file(), f"{page}: {named}"


def test_every_example_configuration_is_valid():
    found = [*(ROOT / "examples").rglob("*.yaml"), *(ROOT / "src").rglob("*.yaml")]
    assert len(found) >= 2
    for path in found:
        load_config(settings_of(path.read_text(encoding="utf-8")))


# ----------------------------------------------------------------------------------------------- running it


def write(title, text):
    """A file of the page; a configuration gets few steps."""
    if title.endswith(".yaml"):
        settings = yaml.safe_load(local(text))
        load_config(settings)  # as it stands
        settings["training_config"] = settings.get("training_config", {}) | SHORT
        settings["evaluation"] = settings.get("evaluation", {}) | {"generate": 2, "max_new_tokens": 4}
        if settings["data"].get("eval") == 0.05:
            settings["data"]["eval"] = 0.5  # of the two rows on the page
        text = yaml.safe_dump(settings)
    Path(title).write_text(text, encoding="utf-8")


def play(page, cli, monkeypatch, names=None):
    """Everything on a page, from top to bottom."""
    names = names or {}
    for block in blocks(page):
        if block.title:
            write(block.title, block.text)
        elif block.why:
            continue
        elif block.language == "python":
            exec(compile(local(block.text), page, "exec"), names)
        elif block.language == "sh":
            for line, words in lines_of(block):
                given = ""
                for each in segments(words):
                    if each[0] != "philora":
                        if shutil.which(each[0]):
                            given = subprocess.run(each, input=given, capture_output=True, text=True, check=True).stdout
                        continue
                    monkeypatch.setattr("sys.stdin", __import__("io").StringIO(given))
                    answer = cli(*map(local, each[1:]))
                    assert answer.code == 0, f"{page}: {line}\n{answer.err}"
                    given = answer.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/quickstart.md",
        "docs/tutorial.md",
        "docs/data.md",
        "docs/cookbook.md",
        "docs/coming-from.md",
        "docs/loralib.md",
    ],
)
def test_the_blocks_of_a_page_work(page, cli, tmp_path, monkeypatch, phi3):
    monkeypatch.chdir(tmp_path)
    play(page, cli, monkeypatch, {"base_model": phi3()})


@pytest.fixture(scope="module")
def after_a_run(tmp_path_factory):
    """A folder as a reader has it after the quick start: support.yaml, runs, and files to ask and judge with."""
    import philora

    folder = tmp_path_factory.mktemp("reader")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": f"A number: {n}."},
            ]
        }
        for n in range(40)
    ]
    for name, rows in (("conversations", chats), ("new", chats[:6]), ("chats", chats[:2])):
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (folder / f"{name}.jsonl").write_text(text.replace("What", "Which") if name == "new" else text)
    (folder / "questions.txt").write_text("Hello?\nWho are you?\n")
    (folder / "judge.py").write_text(
        "import json, sys\nfor line in sys.stdin:\n    print(json.dumps({'id': json.loads(line)['id'], 'score': 1}))\n"
    )
    settings = {
        "model": {"name_or_path": "nano"},
        "data": {"train": str(folder / "conversations.jsonl"), "eval": 0.2},
        "training_config": SHORT | {"output_dir": str(folder / "runs" / "support")},
        "evaluation": {"generate": 2, "max_new_tokens": 4},
    }
    philora.train(settings)
    for name in ("legal", "rank-8", "rank-16", "rank-64"):
        shutil.copytree(folder / "runs" / "support", folder / "runs" / name)
    shutil.copytree(folder / "runs" / "support" / "adapter", folder / "adapter")
    (folder / "support.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        "docs/reliability.md",
        "docs/chat.md",
        "docs/evaluation.md",
        "docs/hub.md",
        "docs/formats.md",
        "docs/serving.md",
        "docs/python.md",
    ],
)
def test_the_blocks_after_a_run_work(page, cli, after_a_run, monkeypatch, tmp_path):
    shutil.copytree(after_a_run, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    play(page, cli, monkeypatch)


def test_every_page_with_something_to_run_is_run():
    """A page that is not in the two lists above has nothing left but settings, data and text."""
    marks = (test_the_blocks_of_a_page_work.pytestmark, test_the_blocks_after_a_run_work.pytestmark)
    run = [page for each in marks for mark in each if mark.name == "parametrize" for page in mark.args[1]]
    for page in PAGES:
        active = [each for each in blocks(page) if not each.why and each.language in ("sh", "python")]
        assert page in run or not active, f"{page}: {active[0].text}"


def test_a_block_that_does_not_work_is_found(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("\n```sh\nphilora config missing.yaml\n```\n")
    with pytest.raises(AssertionError, match="missing"):
        play(page, cli, monkeypatch)
    page.write_text("\n```python\nimport philora\nphilora.no_such_name\n```\n")
    with pytest.raises(AttributeError, match="no_such_name"):
        play(page, cli, monkeypatch)
    for text, said in (
        ("philora --no-such", "no command"),
        ("philora train x.yaml --no-such", "no-such"),
        ("curl https://example.org", "Mark the block"),
    ):
        page.write_text(f"\n```sh\n{text}\n```\n")
        with pytest.raises(AssertionError, match=said):
            look_at(page, *blocks(page))
    page.write_text("\n```\nwhatever\n```\n")
    with pytest.raises(AssertionError, match="without a language"):
        blocks(page)
