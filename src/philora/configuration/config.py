"""Load the configuration of a run: defaults, bounds, older spellings, and the origin of every value.

A configuration is a YAML file, or the same dict in Python, with `KEY=VALUE` overrides on top. `load_config` checks
all of it before any large library is imported and reports every fault at once. What it returns is complete for
philora's own keys. Keys of TRL and PEFT that are not given keep the defaults of TRL and PEFT, which are not copied.

Nothing here imports torch, transformers, TRL or PEFT: `philora.configuration.schema` reads their keys from their
source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from philora.configuration import schema
from philora.configuration.checks import check_lora, check_training, own_defaults, training_defaults
from philora.configuration.data_sources import read_data
from philora.configuration.fields import FIELDS, LIBRARY, rule_of
from philora.configuration.folders import DATA_SUFFIXES, exists, nearest_file
from philora.configuration.reader import KeyPath, Reader, fill_from_yaml
from philora.configuration.run_paths import with_current_places
from philora.configuration.sections import (
    HELPDESK,
    REQUIRED,
    SECTIONS,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TokenizerConfig,
)
from philora.configuration.unknown_keys import likely_section, refuse_unknown, section_keys
from philora.errors import ConfigError, fault, nearest, one_per_line
from philora.families import ALIASES, hub_id

# Scripts and notebooks import the sections from here.
__all__ = ["Config", "DataConfig", "EvaluationConfig", "ModelConfig", "TokenizerConfig", "load_config"]


def _open(source: str | Path | Mapping[str, Any] | Config) -> tuple[Reader, str, str]:
    """Return the reader of a source, the source's name, and the default name of the run folder."""
    reader = Reader("config", "python")
    if isinstance(source, Config):
        given = source.to_dict()
        for key, origin in source.origins.items():
            section, _, name = key.partition(".")
            inner = given.get(section, {})
            default = FIELDS[key].default if key in FIELDS else LIBRARY
            if origin == "default" and name in inner and inner[name] == default:
                del inner[name]
            else:
                reader.origins[section, name] = origin
        reader.given = given
        reader.notices = list(source.notices)
        return reader, source.source, Path(source.source).stem
    if isinstance(source, Mapping):
        reader.given = {key: dict(value) if isinstance(value, Mapping) else value for key, value in source.items()}
        return reader, "python", "philora"
    file = Path(source).expanduser()
    folder = file if file.is_dir() and (file / "config.yaml").is_file() else None
    if folder is not None:
        file /= "config.yaml"
    reader = Reader(str(file), str(file))
    if file.exists() and not file.is_file() and not file.is_dir():
        expected = "a YAML file; this is a pipe or a device, which can be read once, and a run reads its settings again"
        raise ConfigError(fault(str(source), "config", str(source), expected, "Write it to a file first"))
    if not file.is_file():
        expected = "a YAML file, or the folder of a run" if file.is_dir() else "an existing file"
        raise ConfigError(fault(str(source), "config", str(source), expected, nearest_file(file)))
    if file.suffix.lower() in DATA_SUFFIXES:
        expected = "a YAML file of settings, not the conversations themselves"
        todo = f"Write one: philora init {file.name}; or train by the same choices: philora train {file.name}"
        raise ConfigError(fault(str(source), "config", str(source), expected, todo))
    fill_from_yaml(file, reader)
    if folder is not None:
        reader.given, reader.looked_at = with_current_places(folder, reader.given)
        training = reader.given.get("training_config")
        if isinstance(training, Mapping) and "output_dir" in training:
            reader.given["training_config"] = {**training, "output_dir": str(folder)}  # where the run is now
    return reader, str(file), file.stem


def load_config(
    source: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = (), *, needs_files: bool = True
) -> Config:
    """Read, translate and check a configuration; nothing is loaded or written.

    Args:
        source: A YAML file, the folder of a run, a mapping of the same shape, or a Config.
        overrides: `KEY=VALUE` texts, such as "training_config.learning_rate=1e-4"; the value is read as YAML.
        needs_files: Whether a file or folder that does not exist is a fault.

    Returns:
        The configuration, complete for philora's own keys.

    Raises:
        ConfigError: One line for every fault: all of them, not only the first.

    Example:
        >>> load_config({"data": {"train": "helpdesk"}}, ["peft_config.r=8"]).peft_config["r"]
        8
    """
    reader, name, stem = _open(source)
    reader.needs_files = needs_files
    reader.translate()
    for text in overrides:
        reader.override(text)
    unusable = [*_unusable_texts(reader.given, (), reader)]
    if unusable:
        raise ConfigError(one_per_line(unusable))
    config = _build(reader, name, stem)
    if reader.faults:
        raise ConfigError(one_per_line(list(dict.fromkeys(reader.faults))))
    return config


_HOLD_PATHS: Final = ("path", "train", "eval", "name_or_path", "adapter", "output_dir", "cache_dir")


def _unusable_texts(value: Any, path: KeyPath, reader: Reader) -> Iterator[str]:
    """Yield a fault for every text that UTF-8 cannot encode, and for every path whose home folder is not known."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unusable_texts(item, (*path, str(key)), reader)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _unusable_texts(item, path, reader)
    text = ".".join(path) if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        return
    where, name = reader.place(path), ".".join(path)
    try:
        text.encode("utf-8")
        if text.startswith("~") and path[-1:] and path[-1] in _HOLD_PATHS:
            Path(text).expanduser()
    except UnicodeEncodeError as error:
        yield fault(where, name, text, "text that UTF-8 can encode", f"Character {error.start + 1} is half of a pair")
    except RuntimeError:
        expected = "a path whose home folder is known here"
        yield fault(where, name, text, expected, "Write the full path, or set the variable HOME")


def _build(reader: Reader, source: str, stem: str) -> Config:
    origins: dict[str, str] = {}
    sections = (*SECTIONS, "training_config", "peft_config")
    for key, value in reader.given.items():
        if key not in sections:
            reader.fault((str(key),), value, "one of " + ", ".join(sections), likely_section(str(key), sections))
    parts = {}
    for section in sections:
        value = reader.given.get(section)
        if not reader.is_section(section):
            first = dataclasses.fields(SECTIONS[section])[0].name if section in SECTIONS else "key"
            reader.fault((section,), value, "a mapping", f"Write {section}: {{{first}: ...}}")
            value = None
        parts[section] = dict(value or {})
    own = {section: _read_own(section, parts[section], reader, origins) for section in SECTIONS}
    training = _read_library("training_config", parts["training_config"], reader)
    lora = _read_library("peft_config", parts["peft_config"], reader)
    defaults = training_defaults(training, own["data"], stem)
    check_training(training, defaults, own["data"], reader)
    check_lora(lora, reader)
    for section, values, preset in (
        ("training_config", training, defaults),
        ("peft_config", lora, own_defaults("peft_config")),
    ):
        for key in (*preset, *values):
            origins[f"{section}.{key}"] = reader.origin_of((section, key)) if key in values else "default"
    if reader.faults:
        # A Config needs the key; load_config raises the faults.
        own["data"].setdefault("train", ())
    if own["model"].get("trust_remote_code"):
        place = reader.place(("model", "trust_remote_code"))
        reader.notices.append(
            f"{place}: model.trust_remote_code=True runs code from the model's repository. The Phi-3 "
            f"family does not need it, and the code that it ships breaks generation on today's transformers."
        )
    return Config(
        **{section: kind(**own[section]) for section, kind in SECTIONS.items()},
        training_config=_in_order("training_config", defaults | training),
        peft_config=_in_order("peft_config", own_defaults("peft_config") | lora),
        source=source,
        origins=origins,
        notices=tuple(dict.fromkeys(reader.notices)),
    )


def _in_order(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return values with the keys of `FIELDS` first, in its order, then the others in the order given."""
    names = [key.partition(".")[2] for key in FIELDS if key.startswith(f"{section}.")]
    return {key: values[key] for key in (*(name for name in names if name in values), *values)}


def _read_own(section: str, given: dict[str, Any], reader: Reader, origins: dict[str, str]) -> dict[str, Any]:
    """Return the values of one of philora's own sections; record faults and leave their keys out."""
    kind = SECTIONS[section]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in fields:
            refuse_unknown(section, key, value, fields, reader)
            continue
        before = len(reader.faults)
        path = (section, key)
        if path in (("data", "train"), ("data", "eval")):
            read = read_data(path, value, reader)
        else:
            read = reader.read(path, value, fields[key].metadata["rule"])
        if len(reader.faults) == before:
            values[key] = read
    for name, item in fields.items():
        origins[f"{section}.{name}"] = reader.origin_of((section, name)) if name in given else "default"
        if item.default is REQUIRED and name not in given and reader.is_section(section):
            reader.faults.append(
                f"{reader.place((section,))}: {section}.{name} is missing - expected {item.metadata['rule'].text}. "
                f"For the bundled chat set write {section}: {{{name}: {HELPDESK}}}."
            )
    if section == "model":
        _check_model(values, reader)
    return values


def _check_model(values: dict[str, Any], reader: Reader) -> None:
    for key in ("name_or_path", "adapter"):
        path = values.get(key)
        if path in reader.looked_at and reader.needs_files:
            expected = f"an existing folder; there is none at {', '.join(reader.looked_at[path])}"
            reader.fault(("model", key), path, expected, f"Give its current path: model.{key}=PATH")
        elif isinstance(path, str) and path.startswith(("./", "../", "/", "~")):
            values[key] = str(Path(path).expanduser())
            if not exists(Path(values[key])):
                reader.fault(("model", key), path, "an existing folder or a hub id", nearest_file(Path(values[key])))
    name = values.get("name_or_path")
    if isinstance(name, str) and not exists(Path(name)):
        values["name_or_path"] = hub_id(name)
        if "/" not in values["name_or_path"] and name.lower().startswith("phi"):
            expected = f"a hub id, a folder, nano, or one of {', '.join(ALIASES)}"
            reader.fault(("model", "name_or_path"), name, expected, nearest(name.lower(), ALIASES))
    quantization = values.get("quantization")
    if isinstance(quantization, Mapping):
        known = schema.quantization_fields()
        _read_nested(("model", "quantization"), quantization, known, "BitsAndBytesConfig", reader)
        if quantization.get("load_in_4bit") is True and quantization.get("load_in_8bit") is True:
            reader.fault(("model", "quantization", "load_in_8bit"), True, "only one of load_in_4bit and load_in_8bit")
        elif set(quantization) <= set(known) and not any(map(quantization.get, ("load_in_4bit", "load_in_8bit"))):
            expected = "load_in_4bit: true or load_in_8bit: true in it"
            reader.fault(("model", "quantization"), dict(quantization), expected)


def _read_nested(
    path: KeyPath, given: Mapping[str, Any], known: Mapping[str, schema.LibraryField], owner: str, reader: Reader
) -> None:
    for key, value in given.items():
        if key not in known:
            reader.fault((*path, str(key)), value, f"a key of {owner}", nearest(str(key), known))
        else:
            reader.read((*path, key), value, known[key].rule)


def _read_library(section: str, given: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """Return the values of `training_config` or `peft_config`; record faults and leave their keys out."""
    values: dict[str, Any] = {}
    known = schema.training_fields() if section == "training_config" else schema.lora_fields()
    for key, value in given.items():
        rule = rule_of(section, key)
        if rule is None:
            refuse_unknown(section, key, value, section_keys()[section], reader)
            continue
        before = len(reader.faults)
        read = reader.read((section, key), value, rule)
        nested = known[key].nested if key in known else None
        if nested is not None and isinstance(read, Mapping):
            _read_nested((section, key), read, schema.lora_nested_fields(nested), nested, reader)
        if len(reader.faults) == before:
            values[key] = read
    return values
