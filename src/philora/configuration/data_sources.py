"""Read `data.train` and `data.eval`: paths, mappings, and lists of them."""

from __future__ import annotations

import dataclasses
import os
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from philora.configuration.fields import FIELDS
from philora.configuration.folders import RECORD_SUFFIXES, exists, nearest_file
from philora.configuration.reader import KeyPath, Reader
from philora.configuration.schema import TEXT, Misfit, Rule, number, union
from philora.configuration.sections import COLUMN_ROLES, HELPDESK, TURN_COLUMNS, SourceConfig
from philora.configuration.unknown_keys import refuse_unknown
from philora.errors import nearest


def _template(value: Any) -> str:
    text = str(TEXT.read(value))
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise Misfit(f"{str(error).capitalize()}; a brace that is meant as text is doubled: {{{{ or }}}}") from None
    for _, column, specification, conversion in parts:
        if column is not None and (not column.strip() or specification or conversion):
            raise Misfit("Write a column's name between the braces, and {{ or }} for a brace that is meant as text")
    return text


def read_data(path: KeyPath, value: Any, reader: Reader) -> tuple[SourceConfig, ...] | float | None:
    """Return the sources in a value of `data.train` or `data.eval`, or the share or number of rows to hold out."""
    rule: Rule = FIELDS[".".join(path)].rule
    if path == ("data", "eval") and value is None:
        return None
    if path == ("data", "eval") and isinstance(value, (int, float)):
        part = union(number(above=0, below=1), number(least=1, whole=True))
        read = reader.read(path, value, Rule(rule.text, part.read))
        return 0.0 if read is None else read
    if isinstance(value, (str, Mapping, SourceConfig, os.PathLike)):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        reader.fault(path, value, rule.text)
        return ()
    paths = [path] if len(value) == 1 else [(*path[:-1], f"{path[-1]}[{index}]") for index in range(len(value))]
    sources = [_read_source(inner, item, reader) for inner, item in zip(paths, value, strict=True)]
    return tuple(source for source in sources if source is not None)


def _read_source(path: KeyPath, value: Any, reader: Reader) -> SourceConfig | None:
    if isinstance(value, SourceConfig):
        value = vars(value)
    if isinstance(value, (str, os.PathLike)):
        value = {"path": value}
    if not isinstance(value, Mapping):
        reader.fault(path, value, "a path, or a mapping with a path")
        return None
    fields = {field.name: field for field in dataclasses.fields(SourceConfig)}
    values: dict[str, Any] = {}
    before = len(reader.faults)
    for key, item in value.items():
        if key not in fields:
            refuse_unknown(".".join(path), key, item, fields, reader)
        else:
            values[key] = reader.read((*path, key), item, fields[key].metadata["rule"])
    if "path" not in value:
        reader.fault(path, dict(value), "a path in it", "Add path: with a file, a folder or a hub id")
    elif isinstance(values["path"], str):
        values["path"] = _local_path(path, values["path"], reader)
    if isinstance(values.get("columns"), Mapping):
        _check_columns((*path, "columns"), values["columns"], reader)
    return None if len(reader.faults) > before else SourceConfig(**values)


_TEMPLATE: Final = Rule("a template such as '{instruction}'", _template)


def _check_columns(path: KeyPath, columns: Mapping[str, Any], reader: Reader) -> None:
    for key, value in columns.items():
        read = reader.read((*path, key), value, _TEMPLATE)
        if key in COLUMN_ROLES[1:] and isinstance(read, str) and "{" not in read:
            hint = f"Write '{{{read}}}' if that is the column's name"
            reader.fault((*path, key), value, "a template with the name of a column in braces", hint)
        if key not in COLUMN_ROLES:
            reader.fault((*path, key), value, "one of " + ", ".join(COLUMN_ROLES), nearest(key, COLUMN_ROLES))
    given = set(columns)
    alone = given in ({"text"}, {"messages"}, {"messages", "system"})
    pair = ({"user", "assistant"} <= given or {"prompt", "completion"} <= given) and not {"text", "messages"} & given
    if not (alone or pair or set(TURN_COLUMNS[:3]) <= given <= set(TURN_COLUMNS)):
        expected = (
            "user and assistant, prompt and completion, text alone, messages (with or without system), or of one row "
            "for each message conversation, role and content (with or without time)"
        )
        reader.fault(path, dict(columns), expected)


def _local_path(path: KeyPath, text: str, reader: Reader) -> str:
    """Return a data path as it will be opened; record a fault where a local file is named that does not exist.

    A relative path is looked for from the working folder, then beside the configuration file.
    """
    if text == HELPDESK or "://" in text or any(sign in text for sign in "*?["):
        return text
    file = Path(text).expanduser()
    if exists(file):
        return str(file) if text.startswith("~") else text
    beside = Path(reader.where).parent / file
    if reader.where != "config" and not file.is_absolute() and exists(beside):
        return str(beside.resolve())
    looks_local = (
        text.startswith(("./", "../", "/", "~", ".\\"))
        or file.suffix.lower() in RECORD_SUFFIXES
        or text.count("/") > 1
        or text.endswith("/")
    )
    if looks_local and reader.needs_files:
        # The line of the path inside the source, when the source is a mapping.
        place = (*path, "path") if (*path, "path") in reader.places else path
        key = ".".join(path)
        if text in reader.looked_at:
            todo = f"It was looked for at {', '.join(reader.looked_at[text])}. Give its current path: {key}=PATH"
        else:
            todo = nearest_file(file) or f"Relative paths start at {Path.cwd()}"
        reader.fault(place, text, "an existing file or folder, or a hub id", todo)
    return text
