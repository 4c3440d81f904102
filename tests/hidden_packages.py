"""Hide every installed package that the machine of `make gpu` does not have. A plugin: `-p tests.hidden_packages`.

Visible are the packages of tools/gpu_carry.txt, and those that the list names as brought by PyTorch's image.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.metadata import Distribution, packages_distributions
from typing import Any

from packaging.utils import canonicalize_name

from tools import gpu_carry


class Visible:
    """Finds what Python's own finder of files finds, but for hidden packages.

    Args:
        distributions: Names of the packages that are visible.
    """

    def __init__(self, distributions: frozenset[str]) -> None:
        self.distributions = distributions
        self.hidden = {
            module
            for module, owners in packages_distributions().items()
            if not any(canonicalize_name(owner) in distributions for owner in owners)
        }

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As `PathFinder.find_spec`."""
        return None if name.partition(".")[0] in self.hidden else PathFinder.find_spec(name, path, target)

    def find_distributions(self, *context: Any) -> Iterator[Distribution]:
        """As `PathFinder.find_distributions`."""
        for found in PathFinder.find_distributions(*context):
            if canonicalize_name(found.metadata["Name"]) in self.distributions:
                yield found

    def invalidate_caches(self) -> None:
        """As `PathFinder.invalidate_caches`."""
        PathFinder.invalidate_caches()


def hide() -> None:
    """Hide them in this process, for what is imported from now on."""
    carried = gpu_carry.read(gpu_carry.LIST.read_text(encoding="utf-8"))
    visible = Visible(frozenset(carried.versions) | carried.brought | {"philora"})
    sys.meta_path[:] = [visible if finder is PathFinder else finder for finder in sys.meta_path]


hide()
