"""A first configuration: the model by facts of a machine, the settings by the data, as YAML that is read back."""

from __future__ import annotations

import re

import pytest

from philora.configuration.config import load_config
from philora.configuration.folders import holds_data, newest_folder, unused_folder
from philora.errors import ConfigError, DataError
from philora.families import ALIASES, MODELS, OTHER, hub_id
from philora.interface.choices import choose
from philora.models.loading import local_path
from philora.planning import starter
from philora.planning.starter import Machine, choose_model, start

GB = 10**9
MACHINE = Machine("cuda", 24 * GB, 2, True, True, frozenset())
MINI = "microsoft/Phi-3-mini-4k-instruct"


@pytest.mark.parametrize(
    ("changes", "named", "expected"),
    [
        ({}, None, (MINI, "none")),
        ({"memory_bytes": 8 * GB}, None, (MINI, "nf4")),
        ({"memory_bytes": 8 * GB, "quantizes": False}, None, ("nano", "none")),
        ({"memory_bytes": 4 * GB}, None, ("nano", "none")),
        ({"weight_bytes": 4, "memory_bytes": 16 * GB}, None, (MINI, "nf4")),
        ({"online": False}, None, ("nano", "none")),
        ({"online": False, "cached": frozenset([ALIASES["phi-4-mini"]])}, None, (ALIASES["phi-4-mini"], "none")),
        ({"cached": frozenset([ALIASES["phi-3.5-mini"]])}, None, (ALIASES["phi-3.5-mini"], "none")),
        ({}, "phi-4", ("microsoft/phi-4", "nf4")),
        ({"memory_bytes": 80 * GB}, "phi-4", ("microsoft/phi-4", "none")),
        ({"memory_bytes": 4 * GB}, "phi-4", ("microsoft/phi-4", "nf4")),
        ({"memory_bytes": 1 * GB}, "somebody/else", ("somebody/else", "none")),
    ],
)
def test_the_model_follows_from_the_machine(changes, named, expected):
    choice = choose_model(MACHINE._replace(**changes), named)
    assert (choice.name, choice.quantization) == expected
    assert ("toy" in choice.reason) == (choice.name == "nano")


def test_what_is_not_installed_is_named():
    choice = choose_model(MACHINE._replace(memory_bytes=8 * GB, quantizes=False))
    assert "pip install 'philora[quantization]'" in choice.reason


def test_the_facts_of_this_machine():
    found = starter.this_machine()
    assert found.memory_bytes > GB
    assert found.weight_bytes in (2, 4)
    assert not found.online, "the tests have no network"


@pytest.mark.parametrize(("rows", "share"), [(4, None), (8, 0.1), (999, 0.1), (1000, 0.05)])
def test_the_configuration_is_read_back(jsonl, rows, share):
    data = jsonl([{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(rows)], "a 'b': #c.jsonl")
    begun = start(str(data), None, MACHINE)
    file = data.with_name("made.yaml")
    file.write_text(begun.text)
    config = load_config(file)
    assert config == load_config(begun.settings, ["training_config.output_dir=runs/made"])
    assert config.model.name_or_path == MINI
    assert config.data.train[0].path == str(data)
    assert config.data.eval == share
    assert begun.found.startswith(f"{rows:,} records of ")
    assert "read as prompt_completion (turns of user, assistant)" in begun.found


def test_data_that_cannot_be_read_is_refused(jsonl):
    with pytest.raises(DataError, match="expected messages, conversations"):
        start(str(jsonl([{"a": 1}])), None, MACHINE)


@pytest.mark.parametrize(
    ("name", "content", "data"),
    [
        ("a.csv", "q,a\n", True),
        ("a.jsonl", "{}", True),
        ("a.yaml", "data: {train: x}", False),
        ("a.json", '{"data": {"train": "x"}}', False),
        ("a.json", '{"data": [{"prompt": "x"}]}', True),
        ("a.json", '[{"prompt": "x"}]', True),
        ("a.json", '{"prompt": "x"}\n{"prompt": "y"}\n', True),
        ("folder/train.parquet", "", True),
        ("run/config.yaml", "", False),
        ("folder/notes.md", "", False),
    ],
)
def test_data_and_configurations_are_told_apart(tmp_path, name, content, data):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    assert holds_data(str(file.parent if "/" in name else file)) == data


def test_nothing_is_data_that_is_not_there(tmp_path):
    assert not holds_data(str(tmp_path / "a.csv"))


def test_a_run_gets_a_folder_of_its_own(tmp_path):
    folder = tmp_path / "chats"
    assert unused_folder(folder) == newest_folder(folder) == folder
    for number in ("", "-2", "-10", "-old"):
        (tmp_path / f"chats{number}").mkdir()
        (tmp_path / f"chats{number}" / "config.yaml").touch()
    assert unused_folder(folder) == tmp_path / "chats-3"
    assert newest_folder(folder) == tmp_path / "chats-10"


# -- short names


def test_short_names_stand_for_known_models():
    known = {each for model in (*MODELS, *OTHER) for each in model.hub_ids}
    assert set(ALIASES.values()) <= known
    assert all(name == name.lower() for name in ALIASES)
    assert hub_id("Phi-4-Mini") == "microsoft/Phi-4-mini-instruct"
    assert hub_id("me/phi-4") == "me/phi-4"


@pytest.mark.parametrize(("name", "parameters"), [("phi-3-mini", 3.82e9), ("phi-4", 14.7e9), ("phi-4-mini", 3.84e9)])
def test_parameters_are_those_of_the_model_cards(name, parameters):
    from philora.families import find

    assert find(hub_id(name)).parameters == pytest.approx(parameters, rel=0.01)


def test_short_names_are_taken_where_a_model_is_named(tmp_path, monkeypatch):
    data = {"train": "helpdesk"}
    assert load_config({"model": {"name_or_path": "phi-3-mini"}, "data": data}).model.name_or_path == MINI
    assert local_path("phi-3-mini") == MINI
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phi-3-mini").mkdir()
    assert load_config({"model": {"name_or_path": "phi-3-mini"}, "data": data}).model.name_or_path == "phi-3-mini"
    assert local_path("phi-3-mini") == "phi-3-mini"
    with pytest.raises(ConfigError, match=r"name_or_path='phi3-mini' - expected .*Did you mean 'phi-3-mini'\?"):
        load_config({"model": {"name_or_path": "phi3-mini"}, "data": data})


def test_what_the_command_line_says_of_the_data_is_heeded(tmp_path):
    data = tmp_path / "export.csv"
    data.write_text("Frage;Antwort;Datum\n" + "".join(f"Wo ist {n}?;Hier {n}.;heute\n" for n in range(8)))
    with pytest.raises(DataError, match=r"data\.train\.columns=") as refusal:
        choose(str(data), [])
    said = re.search(r"'(data\.train\.columns=[^']*)'", str(refusal.value))[1]
    assert said == 'data.train.columns={user: "{Frage}", assistant: "{Antwort}"}'

    choice = choose(str(data), [said, "training_config.max_steps=3"])
    columns = {"user": "{Frage}", "assistant": "{Antwort}"}
    assert load_config(choice.source, choice.overrides).data.train[0].columns == columns
    begun = start(str(data), None, MACHINE, [said])
    file = tmp_path / "made.yaml"
    file.write_text(begun.text)
    assert load_config(file).data.train[0].columns == columns
    assert load_config(file).data.train[0].path == str(data)


@pytest.mark.parametrize(
    ("override", "place"),
    [("data.train.columns={user: a}", "data.train.columns"), ("data.train.colums={}", "data.train.colums")],
)
def test_what_is_wrong_in_it_is_named(tmp_path, override, place):
    data = tmp_path / "export.csv"
    data.write_text("a,b\nc,d\n")
    with pytest.raises(ConfigError, match=re.escape(place)):
        choose(str(data), [override])
