"""Refuse symbolic links in downloaded folders that lead out of the folder.

A downloaded adapter, run or dataset may have a link to any file of this machine. Copying the link would publish that
file, and writing to it would overwrite the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from philora.errors import PhiloraError, fault, one_per_line


def leads_out(folder: Path, path: Path) -> bool:
    """Return whether a path inside a folder leads out of it, through a link at any level.

    A snapshot in the Hub's cache has links to the repository's `blobs` folder, so there the repository's folder counts.
    """
    folder = folder.resolve()
    allowed = next((part.parent for part in (folder, *folder.parents) if part.name == "snapshots"), folder)
    if allowed is not folder and not (allowed / "blobs").is_dir():
        allowed = folder
    return not path.resolve().is_relative_to(allowed)


def refuse_leading_out(folder: Path, kind: type[PhiloraError], paths: Iterable[Path] | None = None) -> None:
    """Refuse a folder with links that lead out of it.

    Args:
        folder: A downloaded folder, such as an adapter's.
        kind: Class of the error.
        paths: Paths that will be used; default: everything directly in the folder.

    Raises:
        PhiloraError: There are such links. The error is of class `kind`, with one line per link.
    """
    found = sorted(folder.iterdir()) if paths is None else paths
    expected = "a file inside the folder"
    todo = "Put the file itself there, or delete the link"
    faults = [fault(str(folder), "link", path.name, expected, todo) for path in found if leads_out(folder, path)]
    if faults:
        raise kind(one_per_line(faults))
