"""From the words of a command line to the configuration of a run: a file, or data with settings that fit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from philora.cli.application import FLAGS


def config_source(config: str) -> str:
    """Return the file of a configuration: the bundled one for `demo`, unless there is a file of that name."""
    if config != "demo" or Path(config).exists():
        return config
    from importlib import resources

    return str(resources.files("philora") / "nano" / "demo.yaml")


def flag_overrides(context: typer.Context) -> list[str]:
    """Return the options that are settings, as overrides."""
    given = []
    for name, key in FLAGS.items():
        value = context.params[name]
        if value is None:
            continue
        if name == "target_modules" and "," in value:
            value = json.dumps([each.strip() for each in value.split(",")])
        elif name in ("model", "output") or (name == "evaluation" and Path(value).expanduser().exists()):
            value = json.dumps(value, ensure_ascii=False)  # text, whatever YAML would read in it
        given.append(f"{key}={value}")
    return given


def data_stem(data: str) -> str:
    """Return what a run on data is called: the name of its file or folder, without the endings."""
    name = Path(data.rstrip("/")).expanduser().absolute().name
    return name.removesuffix(".gz").removesuffix(".zst").partition(".")[0] or "data"


def with_choices(source: str, overrides: list[str], resume: bool | str) -> tuple[Any, list[str], list[str]]:
    """Return the configuration of a run, its overrides, and remarks on it: a file's, or settings that fit the data.

    A run on data gets a folder of its own, named after it; with `resume` it is the newest of that name.
    """
    from philora.configuration.config import holds_data, newest_folder, unused_folder
    from philora.configuration.yaml_text import parse

    if not holds_data(source):
        return config_source(source), overrides, []
    last = dict(each.partition("=")[::2] for each in overrides)
    keys = ("training_config.output_dir", "model.name_or_path")
    named, model = (str(parse(last[each])[1]) if each in last else None for each in keys)
    folder = Path("runs") / data_stem(source)
    if resume:
        return named or str(newest_folder(folder)), overrides, []
    from philora.planning.starter import start

    begun = start(source, model)
    if named is None:
        overrides = [*overrides, f"training_config.output_dir={json.dumps(str(unused_folder(folder)))}"]
    return begun.settings, overrides, [begun.found, f"model: {begun.model.name} ({begun.model.reason})"]
