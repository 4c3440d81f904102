"""Symbolic links in folders from outside: nothing that leads out of a folder is followed.

A downloaded adapter, run or dataset may hold a link to any file of this machine. Copying it would publish that file,
and writing to it would overwrite it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from philora.errors import PhiloraError, fault, one_per_line


def leads_out(folder: Path, path: Path) -> bool:
    """Return whether a path inside a folder names something outside it, through a link at any level.

    The Hub's cache keeps a snapshot as links to its `blobs` folder, so the folder of the whole repository counts there.
    """
    folder = folder.resolve()
    allowed = next((part.parent for part in (folder, *folder.parents) if part.name == "snapshots"), folder)
    if allowed is not folder and not (allowed / "blobs").is_dir():
        allowed = folder
    return not path.resolve().is_relative_to(allowed)


def refuse_leading_out(folder: Path, kind: type[PhiloraError], paths: Iterable[Path] | None = None) -> None:
    """Refuse a folder with links that lead out of it.

    Args:
        folder: A folder from outside, such as an adapter's.
        kind: What to raise.
        paths: What is going to be used; default: everything in the folder itself.

    Raises:
        PhiloraError: Of the given kind, with one line for every link.
    """
    found = sorted(folder.iterdir()) if paths is None else paths
    faults = [
        fault(
            str(folder), "link", path.name, "a file inside the folder", "Put the file itself there, or delete the link"
        )
        for path in found
        if leads_out(folder, path)
    ]
    if faults:
        raise kind(one_per_line(faults))
