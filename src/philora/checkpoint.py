"""Files of a run: written whole or not at all, and checked when they are read.

A file or folder is written under a temporary name in the same directory, synced, then renamed; what exists under its
final name is whole. A checkpoint also carries a manifest of its files, written last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from philora.errors import AdapterError, ConfigError, fault, one_per_line

MANIFEST_NAME = "philora_manifest.json"
TEMPORARY_PREFIX = ".saving-"


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 so that `path` holds either its old content or all of the new."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, as `write_text` does. Not-a-number and infinities become null."""
    write_text(path, json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room; torch, safetensors and tokenizers each have a class of their own."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)


def _sync(folder: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there, and renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that becomes `final`, replacing what was there, when the block ends without an error.

    Yields:
        An empty folder beside `final`.
    """
    temporary = final.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_taken(path: Path) -> bool:
    """Whether something stands where a new folder is to be written; an empty folder does not count."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def publish(temporary: Path, final: Path) -> None:
    """Sync every file below `temporary` and rename the folder to `final`; a folder of that name is replaced."""
    for root, _, names in os.walk(temporary):
        for name in names:
            with Path(root, name).open("rb") as file:
                os.fsync(file.fileno())
        _sync(Path(root))
    if final.exists():
        old = final.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-old-{final.name}")
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(final)
    _sync(final.parent)


# ------------------------------------------------------------------------------------------- checkpoints


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of a folder: size and SHA-256 of each file, and `facts` about the run."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    write_json(folder / MANIFEST_NAME, {"format": 1, "files": files, **(facts or {})})


def faults_of(folder: Path) -> list[str]:
    """What is wrong with a sealed folder; empty when every file is as it was written."""
    manifest = folder / MANIFEST_NAME
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        expected = {str(name): (int(each["bytes"]), str(each["sha256"])) for name, each in files.items()}
    except FileNotFoundError:
        return [f"{MANIFEST_NAME} is missing: it was not written to the end"]
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError):
        return [f"{MANIFEST_NAME} cannot be read"]
    faults = []
    for name, (size, digest) in expected.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            faults.append(f"{name} lies outside the folder")
        elif not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != size:
            faults.append(f"{name} has {path.stat().st_size} bytes in place of {size}")
        elif _digest(path) != digest:
            faults.append(f"{name} was changed after it was written")
    return faults


class Found(NamedTuple):
    """The newest whole checkpoint of a run, if any, and those passed over with the reason."""

    folder: Path | None
    passed_over: list[tuple[Path, str]]


def newest_whole(checkpoints: Path) -> Found:
    """Look for the newest checkpoint that is whole; every file of those looked at is read once."""
    passed_over: list[tuple[Path, str]] = []
    numbered = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in checkpoints.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit()
    ]
    for _, path in sorted(numbered, reverse=True):
        faults = faults_of(path)
        if not faults:
            return Found(path, passed_over)
        passed_over.append((path, "; ".join(faults)))
    return Found(None, passed_over)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted process left half-written in `folder`."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; the lock ends with the process, however it ends.

    Raises:
        ConfigError: Another process holds it.
    """
    with (folder / ".lock").open("w") as file:
        try:
            _lock(file)
        except OSError:
            expected = "a folder that no other run is writing to"
            todo = "Wait for it, or give another training_config.output_dir"
            raise ConfigError(fault("train", "output_dir", str(folder), expected, todo)) from None
        yield


# ---------------------------------------------------------------------------------------------- adapters


def read_peft_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors of an adapter folder in PEFT's format.

    Raises:
        AdapterError: The folder is no such adapter, or a file of it cannot be read.
    """
    where = str(folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    faults = [
        fault(where, "file", path.name, "this file in an adapter folder", "Is it the `adapter` folder of a run?")
        for path in (config, weights)
        if not path.is_file()
    ]
    if not faults:
        try:
            if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
                raise ValueError("not an object")
        except ValueError as error:
            faults.append(fault(str(config), "content", str(error), "JSON as PEFT writes it"))
        try:
            tensors = load_file(weights)
        except (SafetensorError, OSError, ValueError) as error:
            expected = "a whole safetensors file"
            faults.append(fault(str(weights), "content", str(error), expected, "Copy it again, or use a checkpoint"))
    if faults:
        raise AdapterError(one_per_line(faults))
    return tensors
