"""Read which settings the installed TRL, transformers and PEFT accept, from their source and without importing them.

`trl.SFTConfig` and `peft.LoraConfig` take some 200 keys, which change from release to release. Importing them takes
seconds. Parsing the files that define them takes hundredths of a second and gives the same keys. Only names,
annotations, defaults and choices are read; no code of those files runs.

This module also defines `Rule`, the bound of one value: its text in a message, and the function that reads a value or
refuses it. Rules for the libraries' fields are made from their annotations.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Final

from philora.errors import ConfigError

# YAML 1.1 (PyYAML) reads 5e-6 and 1e-4 as strings because the mantissa has no dot or the exponent no sign.
_EXPONENT_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


class _Unknown(Enum):
    """The type of `UNKNOWN`."""

    UNKNOWN = "chosen by the library"


UNKNOWN: Final = _Unknown.UNKNOWN
"""Placeholder for a default that the library computes at import, such as the optimizer of the installed torch."""


class Misfit(ValueError):
    """A value that a rule refuses; `hint` may name what to write instead."""

    def __init__(self, hint: str = "") -> None:
        super().__init__(hint)
        self.hint = hint


@dataclass(frozen=True)
class Rule:
    """The bound of a value.

    Attributes:
        text: What a message writes after "expected".
        read: Returns the value to use (a number written as text becomes a number) or raises `Misfit`.
        choices: The allowed words, for finding the nearest one.
        null: Whether null is allowed.
    """

    text: str
    read: Callable[[Any], Any]
    choices: tuple[str, ...] = ()
    null: bool = False


def _flag(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise Misfit("Write true or false without quotes" if str(value).lower() in ("true", "false") else "")


def _text(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and value.strip():
        return str(value)
    raise Misfit


def _any_text(value: Any) -> str:
    if value == "None":
        raise Misfit("YAML writes null, not None")
    return value if value == "" and isinstance(value, str) else _text(value)


def _null(value: Any) -> None:
    if value is not None:
        raise Misfit("YAML writes null, not None" if value == "None" else "")


def _number(value: Any) -> float | int:
    if isinstance(value, bool):
        raise Misfit
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, str) and _EXPONENT_NUMBER.fullmatch(value):
        return float(value)
    try:
        float(value)
    except (TypeError, ValueError):
        raise Misfit from None
    raise Misfit("Write the number without quotes" if isinstance(value, str) else "")


FLAG = Rule("true or false", _flag)
TEXT = Rule("text", _text)
NULL = Rule("null", _null, null=True)
ANYTHING = Rule("any value", lambda value: value, null=True)


def exactly(expected: object) -> Rule:
    """Return the rule of one literal, such as `auto`."""

    def read(value: Any) -> Any:
        if type(value) is type(expected) and value == expected:
            return value
        raise Misfit

    text = str(expected).lower() if isinstance(expected, bool) else str(expected)
    return Rule(text, read, (expected,) if isinstance(expected, str) else ())


def number(
    *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf, most: float = math.inf,
    whole: bool = False,
) -> Rule:  # fmt: skip
    """Return the rule of a finite number within bounds; `whole` turns 8.0 into 8 and refuses 8.5.

    Example:
        >>> number(above=0, below=1).text
        'a finite number above 0 and below 1'
        >>> number(least=1, whole=True).read(8.0)
        8
    """
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("above", above), ("of at least", least), ("below", below), ("at most", most))
        if math.isfinite(bound)
    ]
    text = " ".join(["a whole number" if whole else "a finite number", " and ".join(bounds)]).rstrip()

    def read(value: Any) -> float | int:
        value = _number(value)
        try:
            finite = math.isfinite(value)
        except OverflowError:  # a whole number beyond the range of a float
            finite = False
        if not finite or (whole and value != int(value)) or not (above < value < below and least <= value <= most):
            raise Misfit
        return int(value) if whole else value

    return Rule(text, read)


def one_of(*words: str) -> Rule:
    """Return the rule of one word of a fixed set; false is read as `no`, as YAML 1.1 does, if that is one of them."""

    def read(value: Any) -> str:
        if isinstance(value, Enum):
            value = value.value
        if value is False and "no" in words:
            return "no"
        if isinstance(value, str) and value in words:
            return value
        raise Misfit

    return Rule("one of " + ", ".join(words), read, words)


def list_of(item: Rule) -> Rule:
    """Return the rule of a list whose members all fit `item`; tuples and sets from Python callers become lists."""

    def read(value: Any) -> list[Any]:
        if isinstance(value, (set, frozenset)):
            value = sorted(value, key=str)
        if not isinstance(value, (list, tuple)):
            raise Misfit
        return [item.read(entry) for entry in value]

    return Rule(f"a list ({item.text})", read)


def mapping_of(item: Rule) -> Rule:
    """Return the rule of a mapping from text to values that fit `item`."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise Misfit
        return {key: item.read(entry) for key, entry in value.items()}

    return Rule("a mapping" if item is ANYTHING else f"a mapping of names to {item.text}", read)


def union(*rules: Rule) -> Rule:
    """Return a rule that any of several rules satisfies; null is named last, as in `text, a list (text) or null`."""
    ordered = list({rule.text: rule for rule in sorted(rules, key=lambda rule: rule.null)}.values())

    def read(value: Any) -> Any:
        hints = []
        for rule in ordered:
            try:
                return rule.read(value)
            except Misfit as misfit:
                hints.append(misfit.hint)
        raise Misfit(next(filter(None, hints), ""))

    text = " or ".join(filter(None, (", ".join(rule.text for rule in ordered[:-1]), ordered[-1].text)))
    choices = tuple(word for rule in ordered for word in rule.choices)
    return Rule(text, read, choices, any(rule.null for rule in ordered))


STEPS = replace(
    union(number(above=0, below=1), number(least=1, whole=True)),
    text="a whole number of steps of at least 1, or a fraction of the run above 0 and below 1",
)


@dataclass(frozen=True)
class LibraryField:
    """One field of a library's configuration class.

    Attributes:
        default: The default, or `UNKNOWN` where the library computes it.
        rule: What the annotation and the field's choices allow.
        nested: The class whose fields the value has when it is a mapping, such as `EvaConfig`.
    """

    default: Any
    rule: Rule
    nested: str | None = None


# The file of every class, ancestors first: fields of a later class replace those of an earlier one.
_TRAINING: Final = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
)
_LORA: Final = (
    ("peft", "config.py", "PeftConfigMixin"),
    ("peft", "config.py", "PeftConfig"),
    ("peft", "tuners/lora/config.py", "LoraConfig"),
)
_ENUMS: Final = {
    "SchedulerType": ("transformers", "trainer_utils.py"),
    "IntervalStrategy": ("transformers", "trainer_utils.py"),
    "SaveStrategy": ("transformers", "trainer_utils.py"),
    "HubStrategy": ("transformers", "trainer_utils.py"),
    "OptimizerNames": ("transformers", "training_args.py"),
    "DebugOption": ("transformers", "debug_utils.py"),
    "TaskType": ("peft", "utils/peft_types.py"),
    "PeftType": ("peft", "utils/peft_types.py"),
}


@cache
def _module(package: str, path: str) -> ast.Module:
    # find_spec of a top-level package does not import it.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{package}: not installed - expected it beside philora. Run `pip install {package}`.")
    file = Path(spec.origin).parent / path
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise ConfigError(
            f"{file}: {error} - expected the source of {package}, from which philora reads the allowed keys. "
            f"Install {package} again."
        ) from error


def _class(package: str, path: str, name: str) -> ast.ClassDef:
    for node in _module(package, path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise ConfigError(
        f"{package}/{path}: no class {name} - expected a {package} of the versions that philora supports. "
        f"Run `pip install --upgrade philora`."
    )


@cache
def _words(enum: str) -> tuple[str, ...]:
    return tuple(
        node.value.value
        for node in _class(*_ENUMS[enum], enum).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    )


@cache
def _log_levels() -> tuple[str, ...]:
    for node in _module("transformers", "utils/logging.py").body:
        match node:
            case ast.Assign(targets=[ast.Name(id="log_levels")], value=ast.Dict(keys=keys)):
                return (*(str(ast.literal_eval(key)) for key in keys if key is not None), "passive")
    return ()


_SIMPLE: Final = {
    "bool": FLAG,
    "int": number(whole=True),
    "float": number(),
    "str": Rule("text", _any_text),
    "Any": ANYTHING,
}


def _rule(node: ast.expr, subclasses: frozenset[str]) -> Rule:
    """Return the rule that an annotation states; an unknown annotation allows any value, which the library checks."""
    members = _members(node)
    if len(members) > 1:
        return union(*(_rule(member, subclasses) for member in members))
    match members[0]:
        case ast.Constant(value=None):
            return NULL
        case ast.Constant(value=str(text)):  # a quoted annotation
            return _rule(ast.parse(text, mode="eval").body, subclasses)
        case ast.Name(id=name) if name in _SIMPLE:
            return _SIMPLE[name]
        case ast.Name(id=name) if name in _ENUMS:
            return one_of(*_words(name))
        case ast.Name(id=name) if name in ("dict", "Mapping") or name in subclasses:
            return mapping_of(ANYTHING)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            values = [ast.literal_eval(e) for e in (inner.elts if isinstance(inner, ast.Tuple) else [inner])]
            words = tuple(value for value in values if isinstance(value, str))
            others = [exactly(value) for value in values if not isinstance(value, str)]
            return union(*([one_of(*words)] if words else []), *others)
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return list_of(_rule(inner, subclasses))
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=members)):
            return list_of(_rule(members[0], subclasses))
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, inner])):
            return mapping_of(_rule(inner, subclasses))
        case _:
            return ANYTHING


def _members(node: ast.expr) -> list[ast.expr]:
    """Return the alternatives of `X | Y`, `Union[X, Y]` and `Optional[X]`, or the annotation itself."""
    match node:
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            members = _members(left) + _members(right)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=alternatives)):
            members = [member for alternative in alternatives for member in _members(alternative)]
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            members = [*_members(inner), ast.Constant(value=None)]
        case _:
            return [node]
    # `SchedulerType | str` accepts the values of the enumeration, as members or as text, and no other text.
    if any(isinstance(member, ast.Name) and member.id in _ENUMS for member in members):
        members = [member for member in members if not (isinstance(member, ast.Name) and member.id == "str")]
    return members


def _fields(node: ast.ClassDef, subclasses: frozenset[str]) -> dict[str, LibraryField]:
    found: dict[str, LibraryField] = {}
    for statement in node.body:
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        annotation = ast.unparse(statement.annotation)
        if "ClassVar" in annotation:
            continue
        options: dict[str, ast.expr] = {}
        value = statement.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field":
            options = {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg}
            value = options.get("default")
        if "init" in options and ast.unparse(options["init"]) == "False":
            continue
        rule = _rule(statement.annotation, subclasses)
        words = _choices(options.get("metadata"))
        if words:
            rule = union(one_of(*words), NULL) if rule.null else one_of(*words)
        nested = next((name for name in sorted(subclasses) if re.search(rf"\b{name}\b", annotation)), None)
        found[statement.target.id] = LibraryField(_default(value, options.get("default_factory")), rule, nested)
    return found


def _default(value: ast.expr | None, factory: ast.expr | None) -> Any:
    if isinstance(factory, ast.Name) and factory.id in ("dict", "list"):
        return {} if factory.id == "dict" else []
    if value is None:
        return UNKNOWN
    try:
        return ast.literal_eval(value)
    except ValueError:
        return UNKNOWN


def _choices(metadata: ast.expr | None) -> tuple[str, ...]:
    if not isinstance(metadata, ast.Dict):
        return ()
    for key, value in zip(metadata.keys, metadata.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "choices":
            if "log_levels" in ast.unparse(value):
                return _log_levels()
            try:
                return tuple(str(item) for item in ast.literal_eval(value))
            except (ValueError, TypeError):
                return ()
    return ()


def _merged(classes: Iterable[tuple[str, str, str]], subclasses: frozenset[str]) -> dict[str, LibraryField]:
    """Return the fields of several classes, each given as package, file and name; a later class replaces a field."""
    return {name: field for where in classes for name, field in _fields(_class(*where), subclasses).items()}


@cache
def training_fields() -> Mapping[str, LibraryField]:
    """Return the fields of the installed `trl.SFTConfig`, including those inherited from transformers."""
    return _merged(_TRAINING, frozenset())


@cache
def _lora_subclasses() -> frozenset[str]:
    module = _module("peft", "tuners/lora/config.py")
    return frozenset(node.name for node in module.body if isinstance(node, ast.ClassDef) and node.name != "LoraConfig")


@cache
def lora_fields() -> Mapping[str, LibraryField]:
    """Return the fields of the installed `peft.LoraConfig`, including inherited ones."""
    return _merged(_LORA, _lora_subclasses())


@cache
def lora_nested_fields(name: str) -> Mapping[str, LibraryField]:
    """Return the fields of a class that LoraConfig nests, such as `EvaConfig`."""
    return _fields(_class("peft", "tuners/lora/config.py", name), frozenset())


@cache
def quantization_fields() -> Mapping[str, LibraryField]:
    """Return the arguments of the installed `transformers.BitsAndBytesConfig`.

    They have no annotations; each rule follows from the default and the name.
    """
    node = _class("transformers", "utils/quantization_config.py", "BitsAndBytesConfig")
    signature = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__").args
    names = [argument.arg for argument in signature.args[1:]]
    defaults = [_default(value, None) for value in signature.defaults]
    found = {}
    for name, default in zip(names, defaults, strict=True):
        if isinstance(default, bool):
            rule = FLAG
        elif isinstance(default, (int, float)):
            rule = number()
        elif name.endswith("quant_type"):
            rule = one_of("fp4", "nf4")
        elif name.endswith("compute_dtype"):
            rule = union(one_of("float32", "bfloat16", "float16"), NULL)
        elif name.endswith("quant_storage"):
            rule = union(one_of("float16", "float32", "int8", "uint8", "float64", "bfloat16"), NULL)
        elif name.endswith("modules"):
            rule = union(list_of(TEXT), NULL)
        else:
            rule = ANYTHING
        found[name] = LibraryField(default, rule)
    return found
