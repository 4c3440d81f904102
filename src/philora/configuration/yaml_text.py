"""Read and write YAML for configurations: numbers as in YAML 1.2, text that can be written again, bounded sizes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import yaml

_MOST_VALUES: Final = 100_000
_MOST_LEVELS: Final = 100
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
# Of YAML 1.2's core schema (section 10.3.2). PyYAML has YAML 1.1's, where 1:00 is 60, 010 is 8, 1_0 is 10,
# 2001-01-01 is a date and 1e-4 a text.
_NUMBERS: Final = (
    (_INT, re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), "-+0123456789"),
    (
        _FLOAT,
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        "-+.0123456789",
    ),
)
_REPLACED: Final = (_INT, _FLOAT, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
NOT_YAML: Final = (
    yaml.YAMLError, ValueError, RecursionError, AttributeError, KeyError, TypeError, IndexError, OverflowError,
)  # fmt: skip
"""What PyYAML raises: its own class, and what follows from a tag whose value does not fit it."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2; nothing is executed."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Return the text of a scalar; JSON writes a character beyond 16 bits as two escapes, which are joined."""
        text = str(super().construct_scalar(node))
        try:
            return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            problem = "an unpaired surrogate (\\ud800 to \\udfff) is not text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def read_int(self, node: yaml.ScalarNode) -> int:
        """Return an integer: decimal, 0o octal or 0x hexadecimal."""
        text = str(self.construct_scalar(node))
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def read_float(self, node: yaml.ScalarNode) -> float:
        """Return a number with a point or an exponent, .inf or .nan."""
        text = str(self.construct_scalar(node)).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which quotes what would be a number by YAML 1.1 or by 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in _NUMBERS:
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _whole, list(_first))
_readers: dict[str, Callable[[Any, Any], Any]] = {_INT: _Loader.read_int, _FLOAT: _Loader.read_float}
for _tag, _reader in _readers.items():
    _Loader.add_constructor(_tag, _reader)


def parse(content: str) -> tuple[yaml.Node | None, Any]:
    """Return the nodes of a YAML text and their value, whose size is bounded although aliases may multiply it.

    Raises:
        yaml.YAMLError, ValueError and the others of `NOT_YAML`: It is no YAML, or too large.
    """
    if _depth(content) > _MOST_LEVELS:
        raise ValueError(f"it is nested more than {_MOST_LEVELS} levels deep")
    loader = _Loader(content)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        if _values_in(node, {}) > _MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
        return node, loader.construct_document(node)
    finally:
        loader.dispose()


def dump(value: Any, **options: Any) -> str:
    """Return a value as YAML that `parse` and readers of YAML 1.1 read back the same."""
    return str(yaml.dump(value, Dumper=_Dumper, **options))


def _depth(content: str) -> int:
    """Return how deep brackets are nested; PyYAML's time grows with the square of that."""
    depth = most = 0
    for sign in re.findall(r"[\[\]{}]", content):
        depth = depth + 1 if sign in "[{" else max(0, depth - 1)
        most = max(most, depth)
    return most


def _values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a node, each alias as what it repeats; refuse an alias that holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = 0
        parts = node.value if isinstance(node, yaml.SequenceNode) else [item for pair in node.value for item in pair]
        known[id(node)] = 1 + sum(_values_in(part, known) for part in parts)
    elif known[id(node)] == 0:
        raise ValueError("an alias is inside the value that it repeats")
    return known[id(node)]
