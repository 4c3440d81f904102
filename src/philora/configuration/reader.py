"""Read a configuration as it was given: values, the line and the origin of every key, overrides, and faults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from philora.configuration import yaml_text
from philora.configuration.schema import Misfit, Rule
from philora.configuration.spellings import rename_torch_dtype, to_current_names
from philora.errors import ConfigError, fault, nearest

KeyPath = tuple[str, ...]
"""The names that lead to a key, such as `("training_config", "optim")`."""


class Reader:
    """Collect the given values, the line of every key, and all faults.

    Attributes:
        needs_files: Whether a file or folder that does not exist is a fault.
        looked_at: For paths of a run that were not found: where they were looked for.
    """

    def __init__(self, where: str, origin: str) -> None:
        self.where = where
        self.origin = origin
        self.given: dict[str, Any] = {}
        self.places: dict[KeyPath, str] = {}
        self.origins: dict[KeyPath, str] = {}
        self.faults: list[str] = []
        self.notices: list[str] = []
        self.needs_files = True
        self.looked_at: dict[str, tuple[str, ...]] = {}

    def place(self, path: KeyPath) -> str:
        """Return the file and line of a key."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.where)

    def origin_of(self, path: KeyPath) -> str:
        """Return where the value of a key comes from: a file, the command line or Python."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, self.origin)

    def fault(self, path: KeyPath, value: Any, expected: str, todo: str = "") -> None:
        """Record a fault of one value."""
        self.faults.append(fault(self.place(path), ".".join(path), value, expected, todo))

    def is_section(self, section: str) -> bool:
        """Return whether a section is absent or a mapping; for another value `load_config` records a fault."""
        return self.given.get(section) is None or isinstance(self.given[section], Mapping)

    def read(self, path: KeyPath, value: Any, rule: Rule) -> Any:
        """Return the value as the rule reads it; record a misfit and return None."""
        try:
            return rule.read(value)
        except Misfit as misfit:
            hint = misfit.hint
            if not hint and isinstance(value, str):
                hint = "YAML writes null, not None" if value == "None" and rule.null else nearest(value, rule.choices)
            self.fault(path, value, rule.text, hint)
            return None

    # -- older spellings; each layer is translated alone, so that an override replaces a file's value in any spelling

    def translate(self) -> None:
        """Translate the given mapping to today's spelling."""
        training = self.given.get("training_config")
        if isinstance(training, Mapping):
            out = to_current_names(training)
            for today, older in out.came_from.items():
                self.places["training_config", today] = self.place(("training_config", older))
            for key, text in out.notices:
                self.notices.append(f"{self.place(('training_config', key))}: training_config.{text}")
            for key, *rest in out.faults:
                self.fault(("training_config", *key.split(".")), *rest)
            for end in ("", "_kwargs"):
                self._join(out.result, f"activation_checkpointing{end}", f"gradient_checkpointing{end}")
            self.given["training_config"] = out.result
        model = self.given.get("model")
        if isinstance(model, Mapping) and "torch_dtype" in model:
            self.places["model", "dtype"] = self.place(("model", "torch_dtype"))
            result, notices, faults = rename_torch_dtype(model)
            self.notices += [f"{self.place(('model', 'torch_dtype'))}: model.{text}" for text in notices]
            for key, *rest in faults:
                self.fault(("model", key), *rest)
            self.given["model"] = result

    def _join(self, training: dict[str, Any], newer: str, own: str) -> None:
        """Replace transformers' newer name for recomputation by the one that all supported versions have."""
        value, path = training.pop(newer, None), ("training_config", newer)
        if value is None:
            return
        if own in training and training[own] != value:
            expected = f"the same as {own}={training[own]!r}"
            self.fault(path, value, expected, "Remove one of the two: they are the same setting")
        training[own] = value
        self.places["training_config", own] = self.place(path)
        self.notices.append(f"{self.place(path)}: training_config.{newer}={value!r} is read as {own}={value!r}.")

    # -- overrides

    def override(self, text: str) -> None:
        """Apply one `KEY=VALUE`."""
        key, equals, written = text.partition("=")
        key = key.strip()
        if not equals or not key:
            todo = "For example training_config.learning_rate=1e-4"
            self.faults.append(fault("command line", "override", text, "KEY=VALUE", todo))
            return
        try:
            value = yaml_text.parse(written)[1] if written.strip() else None
        except yaml_text.NOT_YAML as error:
            todo = f"{str(getattr(error, 'problem', None) or 'not YAML').capitalize()}; quote the value"
            self.faults.append(fault("command line", key, written, "a YAML value", todo))
            return
        path = tuple(key.split("."))
        layer = Reader("command line", "command line")
        layer.given = _nested(path, value)
        layer.translate()
        self.notices += layer.notices
        self.faults += layer.faults
        # A setting that translation drops leaves an empty section, which has no leaves.
        for leaf_path, leaf in _leaves(layer.given, len(path)):
            self._set(leaf_path, leaf)

    def _set(self, path: KeyPath, value: Any) -> None:
        target = self.given
        for depth, name in enumerate(path[:-1], 1):
            inner = target.get(name)
            if isinstance(inner, str) and path[:depth] in (("data", "train"), ("data", "eval")):
                inner = {"path": inner}
            if inner is None:
                inner = {}
            if not isinstance(inner, Mapping):
                self.places[path] = "command line"
                self.fault(path, value, f"{'.'.join(path[:depth])} to be a mapping", "Give the complete value instead")
                return
            target[name] = inner = dict(inner)
            target = inner
        target[path[-1]] = value
        self.places[path] = self.origins[path] = self.origins[path[:2]] = "command line"


def _nested(path: KeyPath, value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return dict(value)


def _leaves(given: Mapping[str, Any], depth: int, prefix: KeyPath = ()) -> Iterable[tuple[KeyPath, Any]]:
    """Return the values `depth` levels down a mapping, or where the mapping ends before that."""
    for key, value in given.items():
        path = (*prefix, key)
        if depth > 1 and isinstance(value, Mapping):
            yield from _leaves(value, depth - 1, path)
        else:
            yield path, value


_MOST_BYTES = 1 << 20


def fill_from_yaml(file: Path, reader: Reader) -> None:
    """Fill the reader from a file, with the line of every key; raise an error if the file is not a YAML mapping."""
    where = reader.where
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ConfigError(fault(where, "bytes", file.stat().st_size, f"at most {_MOST_BYTES:,}", "Is it the data?"))
        content = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        found = error.object[error.start : error.start + 1]
        message = fault(f"{where}:{line}", "encoding", found, "UTF-8 text", "Save the file as UTF-8")
        raise ConfigError(message) from error
    except OSError as error:
        raise ConfigError(fault(where, "file", str(file), "a readable file", str(error.strerror))) from error
    try:
        node, value = yaml_text.parse(content)
        if node is not None:
            _note_lines(node, (), reader, set())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        text = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{at}: {text} - expected YAML. Check the line and the one above it.") from error
    except yaml_text.NOT_YAML as error:
        at = f":{content.count(chr(10), 0, error.position) + 1}" if isinstance(error, yaml.reader.ReaderError) else ""
        reason = getattr(error, "reason", None) or str(error)
        raise ConfigError(f"{where}{at}: {reason} - expected YAML. Remove what is not text.") from error
    if value is None:
        raise ConfigError(
            f"{where}: the file is empty - expected a configuration with at least data.train. See `philora demo`."
        )
    if not isinstance(value, dict):
        expected = "a mapping with sections such as data and training_config"
        raise ConfigError(fault(where, "the file", value, expected))
    reader.given = value


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, without checking or translating it.

    Raises:
        ConfigError: The file cannot be read, or does not contain a mapping.
    """
    reader = Reader(str(file), str(file))
    fill_from_yaml(file, reader)
    return reader.given


def _note_lines(node: yaml.Node, path: KeyPath, reader: Reader, seen: set[int]) -> None:
    """Record the line of every key, and a fault for every key that occurs twice in one mapping."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode) and path:
        for index, item in enumerate(node.value):
            inner = (*path[:-1], f"{path[-1]}[{index}]")
            reader.places.setdefault(inner, f"{reader.where}:{item.start_mark.line + 1}")
            _note_lines(item, inner, reader, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        inner, line = (*path, key.value), key.start_mark.line + 1
        if key.value in first:
            reader.faults.append(
                f"{reader.where}:{line}: {'.'.join(inner)} is given twice, first in line {first[key.value]} - "
                f"expected each key once. Remove one of the two."
            )
        first.setdefault(key.value, line)
        reader.places.setdefault(inner, f"{reader.where}:{line}")
        _note_lines(value, inner, reader, seen)
