"""Symbolic links in folders from outside: nothing that leads out of a folder is followed.

A downloaded adapter, run or dataset may hold a link to any file of this machine. Copying it would publish that file,
and writing to it would overwrite it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

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
        PhiloraError: Of the given kind, with one line for each link.
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


def open_without_following(path: Path, flags: str) -> IO[str]:
    """Open a text file in UTF-8 for writing; a link at its place is refused.

    Args:
        path: The file.
        flags: A mode of `open`: "w", "a" or "x".

    Raises:
        OSError: With ELOOP where the path is a link.
    """

    def opener(name: str, given: int) -> int:
        if not hasattr(os, "O_NOFOLLOW") and Path(name).is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
        return os.open(name, given | getattr(os, "O_NOFOLLOW", 0), 0o666)

    return open(path, flags, encoding="utf-8", opener=opener)
