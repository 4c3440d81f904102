"""The help of every command: what each option does, an example, and the page that explains the command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from philora.cli.commands import app
from philora.configuration.fields import FIELDS
from philora.interface.choices import SETTINGS

ROOT = Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_in_an_example_and_a_page_of_the_documentation(name):
    example, page = re.fullmatch(r"Example: (.+)\n\nMore: (docs/.+)", COMMANDS[name].epilog).groups()
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("philora", name)
    COMMANDS[name].make_context(name, arguments).close()  # the example parses
    assert f"philora {name}" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_sentence(name):
    texts = {option.name: option.help for option in COMMANDS[name].params if option.name != "help"}
    assert [option for option, text in texts.items() if not re.fullmatch(r"[A-Z-].* .*\.", text or "", re.DOTALL)] == []


@pytest.mark.parametrize("option", [option for option in COMMANDS["train"].params if option.name in SETTINGS])
def test_defaults_of_settings_in_the_help_are_those_of_the_configuration(option):
    stated = re.search(r"Default: ([\w/.-]*\w)", option.help)[1]
    default = str(FIELDS[SETTINGS[option.name]].default)
    assert stated == default.replace("<name of the config file>", "NAME")
