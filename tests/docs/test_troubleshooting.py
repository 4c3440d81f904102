"""Each message that philora can end with has an entry of the troubleshooting page, and the command line names it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import philora
from philora import errors
from philora.cli.troubleshooting import entries, entry_named, entry_of

PACKAGE = Path(philora.__file__).parent
VARIES = "§"


def text(node, names):
    """The text of an expression, with a sign for what is known only when it runs."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(each.value if isinstance(each, ast.Constant) else VARIES for each in node.values)
    if isinstance(node, ast.Name):
        return names.get(node.id, VARIES)
    return VARIES


def message(where, name, expected, todo=VARIES):
    return f"{where}: {name}={VARIES} - expected {expected.rstrip('.')}. {todo}"


def messages(source):
    """(line, message) of every place in a file where one is made."""
    nodes = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.Assign | ast.Call)]
    given = sorted(
        (each.lineno, each.targets[0].id, text(each.value, {}))
        for each in nodes
        if isinstance(each, ast.Assign) and len(each.targets) == 1 and isinstance(each.targets[0], ast.Name)
    )
    for node in nodes:
        if isinstance(node, ast.Assign):
            continue
        function = node.func
        called = getattr(function, "id", getattr(function, "attr", ""))
        names = {name: value for line, name, value in given if line < node.lineno}  # the nearest one above
        said = [text(each, names) for each in node.args if not isinstance(each, ast.Starred)]
        if isinstance(function, ast.Name) and called in ("fault", "_fault") and len(said) >= 4:
            if any(each.strip(VARIES + " ") for each in (said[0], said[1], said[3])):  # else it passes a message on
                yield node.lineno, message(said[0], said[1], *said[3:])
        elif isinstance(function, ast.Attribute) and called == "fault" and len(said) >= 3:  # of a setting
            yield node.lineno, message(VARIES, f"training_config.{VARIES}", *said[2:])
        elif called == "Fault" and len(said) >= 3:  # of a record
            yield node.lineno, message(VARIES, said[0], *said[2:])
        elif called == "refuse" and len(said) >= 2:  # of a section of the configuration
            yield node.lineno, message(VARIES, f"training_config.{said[0]}", *said[1:])
        elif called in dir(errors) and called.endswith("Error") and len(said) == 1 and said[0].strip(VARIES + " "):
            yield node.lineno, said[0]


def without_entry(source):
    return [f"{line}: {each}" for line, each in messages(source) if entry_of(each) is None]


def test_every_message_has_an_entry():
    found = 0
    missing = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if not re.search("fault|Fault|refuse|Error", source):
            continue
        for line, each in messages(source):
            found += 1
            if entry_of(each) is None:
                missing.append(f"{path.relative_to(PACKAGE)}:{line}: {each}")
    assert not missing, "\n".join(missing)
    assert found > 300  # else the search is broken


def test_a_message_without_an_entry_is_found():
    assert without_entry('raise ConfigError(fault("fly", "wings", 3, "two"))')
    assert without_entry('todo = "x"\nraise RunError("no such words anywhere")')
    assert not without_entry('raise ConfigError(fault("merge", "out", 3, "a new or empty folder"))')


def test_every_quoted_message_leads_to_its_own_entry():
    """A form that another entry always takes would be dead text."""
    for entry in entries():
        for form in entry.forms:
            found = entry_of(form.replace("…", "x"))
            assert found is not None, (entry.name, form)
            assert found.name == entry.name, (form, found.name)


def test_names_are_unique_and_every_entry_says_something():
    names = [each.name for each in entries()]
    assert len(names) == len(set(names))
    for each in entries():
        assert each.forms, each.name
        assert len(each.text) > 80, each.name


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("adapter: source='x' - expected a run folder, or a folder with adapter_config.json.", "adapter"),
        ("a.yaml:3: training_config.max_length=9 - expected at most 4, the context of the model.", "window"),
        ("a.yaml:3: training_config.seed='x' - expected a whole number of at least 0.", "setting"),
        ("2 faults:\n  a.jsonl:1: record='{' - expected JSON, but at column 2: no.\n  another", "data-json"),
        ("OSError: [Errno 28] No space left on device: '/x'", "disk-full"),
        ("AssertionError: Torch not compiled with CUDA enabled", "cuda"),
        ("ModuleNotFoundError: No module named 'wandb'", "missing-package"),
        ("push: token=None - expected a token with write access. Set HF_TOKEN", "hub"),
        ("train: output_dir='runs/a' - expected a folder that no other run is writing to.", "run-locked"),
    ],
)
def test_messages_that_people_meet(said, name):
    assert entry_of(said).name == name


def test_what_nobody_knows_has_none():
    assert entry_of("ZeroDivisionError: division by zero") is None


def test_the_command_line_names_the_entry_and_explains_it(cli, tmp_path):
    answer = cli("config", str(tmp_path / "missing.yaml"))
    assert answer.code == 2
    named = re.search(r"help: philora explain (\S+)$", answer.err.strip())
    assert named, answer.err
    told = cli("explain", named[1])
    assert told.code == 0
    assert entry_named(named[1]).title in told.out
    assert cli("explain", "config-fil").err.count("Did you mean 'config-file'?") == 1
    listed = cli("explain")
    assert all(each.name in listed.out for each in entries())
