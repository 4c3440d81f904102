"""YAML as configurations are written in it: numbers and times of YAML 1.2, text that can be written again."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from philora.configuration.config import load_config
from philora.configuration.writing import dump_yaml
from philora.configuration.yaml_text import dump, parse
from philora.errors import ConfigError


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1:00", "1:00"),  # 60 in YAML 1.1
        ("12:30:45", "12:30:45"),
        ("010", 10),  # 8
        ("0o10", 8),
        ("0x1F", 31),
        ("1_000", "1_000"),  # 1000
        ("0b11", "0b11"),  # 3
        ("2001-01-01", "2001-01-01"),  # a date
        ("2001-01-01 10:00:00", "2001-01-01 10:00:00"),
        ("1e-4", 1e-4),  # a text
        ("5e6", 5e6),
        ("-.5", -0.5),
        ("5.", 5.0),
        (".inf", math.inf),
        ("=", "="),
        ("-3", -3),
        ("1.2.3", "1.2.3"),
        ("yes", True),  # words stay as PyYAML has them, since older configurations say packing: yes
        ("null", None),
        ("'1e-4'", "1e-4"),
    ],
)
def test_numbers_and_times_are_those_of_yaml_1_2(written, value):
    found = parse(f"a: {written}")[1]["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("value", ["1:00", "1e-4", "010", "0o7", "2001-01-01", "1_0", "yes", "5.", 1e-4, 1e-10, 7])
def test_what_is_written_is_read_back_the_same_by_both_versions(value):
    text = dump({"a": value})
    assert parse(text)[1] == yaml.safe_load(text) == {"a": value}


def test_a_time_where_a_number_is_wanted_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: helpdesk}\ntraining_config:\n  logging_steps: 1:00\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:3: training_config\.logging_steps='1:00' - expected"):
        load_config(path)


def test_json_with_an_escaped_emoji_is_read_and_written_again(tmp_path):
    path = tmp_path / "run.json"
    settings = {"data": {"train": {"path": "helpdesk", "columns": {"text": "{text} \U0001f600"}}}}
    path.write_text(json.dumps(settings))
    assert "\\ud83d\\ude00" in path.read_text(encoding="ascii")
    config = load_config(path)
    assert config.data.train[0].columns == {"text": "{text} \U0001f600"}
    (tmp_path / "again.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("text", [r'"\ud83d"', r'"a \ude00 b"', r'"\ude00\ud83d"'])
def test_half_of_a_pair_is_refused_with_its_line(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"data:\n  train: helpdesk\nmodel:\n  name_or_path: {text}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:4:17: .*surrogate"):
        load_config(path)


def test_text_that_cannot_be_written_is_refused_from_python_too():
    with pytest.raises(ConfigError, match=r"data\.train.*expected .*UTF-8"):
        load_config({"data": {"train": {"path": "helpdesk", "columns": {"text": "{text} \ud800"}}}})
    with pytest.raises(ConfigError, match=r"training_config\.run_name=.*expected .*UTF-8"):
        load_config({"data": {"train": "helpdesk"}, "training_config": {"run_name": "\ud83d"}})
