"""Choose the configuration of a run from a file, data alone or `demo`, and from settings with short names.

The command line and the Python functions share this module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from philora.configuration.folders import holds_data, newest_folder, unused_folder
from philora.configuration.sections import Config
from philora.configuration.yaml_text import parse
from philora.errors import ConfigError, fault, nearest

SETTINGS = {
    "model": "model.name_or_path", "evaluation": "data.eval", "output": "training_config.output_dir",
    "epochs": "training_config.num_train_epochs", "learning_rate": "training_config.learning_rate",
    "batch_size": "training_config.per_device_train_batch_size", "max_length": "training_config.max_length",
    "seed": "training_config.seed", "rank": "peft_config.r", "alpha": "peft_config.lora_alpha",
    "dropout": "peft_config.lora_dropout", "target_modules": "peft_config.target_modules",
}  # fmt: skip
"""The settings that people change most, by their short names."""


class Choice(NamedTuple):
    """A configuration to start from.

    Attributes:
        source: A file, a mapping or a configuration.
        overrides: `KEY=VALUE` strings that replace its values.
        found: What was found in the data, and which model was chosen; empty for a configuration.
    """

    source: str | Path | Mapping[str, Any] | Config
    overrides: list[str]
    found: list[str]


def overrides_of(settings: Mapping[str, Any]) -> list[str]:
    """Return settings by their short names as `KEY=VALUE` strings; None stands for the default.

    Raises:
        ConfigError: One of them is not a short name.
    """
    unknown = [name for name in settings if name not in SETTINGS]
    if unknown:
        expected = f"one of model, evaluation, output, {', '.join(list(SETTINGS)[3:])}"
        todo = nearest(unknown[0], SETTINGS) or "Other settings go into overrides, such as ['peft_config.bias=all']"
        raise ConfigError(fault("philora", unknown[0], settings[unknown[0]], expected, todo))
    given = {name: value for name, value in settings.items() if value is not None}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return [f"{SETTINGS[name]}={json.dumps(value, ensure_ascii=False)}" for name, value in plain.items()]


def stem(data: str) -> str:
    """Return the name of a run on data: that of the file or folder, without suffixes."""
    name = Path(data.rstrip("/")).expanduser().absolute().name
    return name.removesuffix(".gz").removesuffix(".zst").partition(".")[0] or "data"


def refuse_other_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides of `init` that are not about reading the data.

    Raises:
        ConfigError: One of them is not a key of `data.train`.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key.strip().split(".")[:2] != ["data", "train"]:
            expected = "keys of data.train, such as data.train.columns"
            todo = "Change other settings in the file that is written, or give them to philora train"
            raise ConfigError(fault("init", key, value, expected, todo))


def choose(source: str, overrides: Sequence[str], resume: bool | str = False) -> Choice:
    """Return the configuration of a run: that of a file or of the bundled `demo`; for data, settings that fit it.

    The folder of a run on data is named after it, with a number if it exists; with `resume` the newest one is taken.

    Raises:
        DataError, ConfigError: The data cannot be read.
    """
    given = list(overrides)
    if not holds_data(source):
        if source == "demo" and not Path(source).exists():
            source = str(resources.files("philora") / "nano" / "demo.yaml")
        return Choice(source, given, [])
    last = dict(override.partition("=")[::2] for override in given)
    keys = ("training_config.output_dir", "model.name_or_path")
    named, model = (str(parse(last[key])[1]) if key in last else None for key in keys)
    folder = Path("runs") / stem(source)
    if resume:
        return Choice(named or str(newest_folder(folder)), given, [])
    from philora.planning.starter import start

    begun = start(source, model, overrides=given)
    if named is None:
        given.append(f"training_config.output_dir={json.dumps(str(unused_folder(folder)))}")
    return Choice(begun.settings, given, [begun.found, f"model: {begun.model.name} ({begun.model.reason})"])
