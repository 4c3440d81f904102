"""List private names of other libraries that philora uses, and check that they still exist."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, NamedTuple

from philora.errors import RunError, fault, one_per_line


class PrivateName(NamedTuple):
    """A name that a library may change without notice.

    Attributes:
        name: Its full path; the last part may be an attribute that a class gives to its instances.
        use: What philora uses it for.
        missing: Why no public name can be used.
    """

    name: str
    use: str
    missing: str

    @property
    def library(self) -> str:
        """Return the library that the name belongs to."""
        return self.name.partition(".")[0]


def exists(name: str, *, read_source: bool = True) -> bool:
    """Return whether a library has a name: as an attribute, or as one that a class sets on its instances.

    Args:
        name: The full path.
        read_source: Whether to search the source of a class without the attribute; otherwise it counts as existing.
    """
    path, _, attribute = name.rpartition(".")
    try:
        owner: Any = pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return False
    if hasattr(owner, attribute):
        return True
    if not inspect.isclass(owner):
        return False
    return not read_source or re.search(rf"\bself\.{attribute}\b", inspect.getsource(owner)) is not None


def faults(names: Iterable[PrivateName], *, read_source: bool = True) -> list[str]:
    """Return a message for every name that the installed version of its library lacks."""
    return [
        fault(
            name.library,
            "version",
            version(name.library),
            f"one that has {name.name} ({name.use})",
            f"Install a version of {name.library} that philora allows: pip install --force-reinstall philora",
        )
        for name in names
        if not exists(name.name, read_source=read_source)
    ]


def require(names: Iterable[PrivateName]) -> None:
    """Raise an error if an installed library lacks a method that philora overrides or calls.

    Raises:
        RunError: The library, its version and the name.
    """
    found = faults(names, read_source=False)
    if found:
        raise RunError(one_per_line(found))
