"""Find the cache folder for compiled functions and prepared data, which can be made again."""

from __future__ import annotations

import functools
import os
import stat
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """Return `$XDG_CACHE_HOME/philora`, else `~/.cache/philora`, else a temporary folder if there is no home.

    A process in a container often runs under a user id without a user. It has no home folder, and `HOME` may be `/`,
    which it cannot write to.
    """
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen and Path(chosen).is_absolute():
        return Path(chosen) / "philora"
    try:
        home = Path.home()
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return _temporary()
    made = next(item for item in (home / ".cache" / "philora", home / ".cache", home) if item.exists() or item == home)
    return home / ".cache" / "philora" if os.access(made, os.W_OK | os.X_OK) else _temporary()


@functools.cache
def _temporary() -> Path:
    """Return a temporary folder that only this user can write to, so that other users cannot plant code or data."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"philora-{user}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="philora-"))
