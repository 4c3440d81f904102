"""Files of a run: written whole or not at all, and checked when they are read.

A file or folder is written under a temporary name in the same directory, synced, then renamed; what exists under its
final name is whole. A checkpoint also carries a manifest of its files, written last.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from philora.errors import AdapterError, ConfigError, ModelError, PhiloraError, RunError, fault, one_per_line

logger = logging.getLogger("philora.run")

MANIFEST_NAME = "philora_manifest.json"
STATE_NAME = "philora_state.json"
"""In a checkpoint: what exact resuming needs and transformers does not keep."""
LOCK_NAME = ".lock"
TEMPORARY_PREFIX = ".saving-"
_OLD = "-old-"
_NO_ROOM = ("No space left", "iostream error", "PytorchStreamWriter failed", "unexpected pos")
"""What torch, safetensors and tokenizers say where a file cannot be written to its end."""


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its parts in turn, in UTF-8 so that `path` holds either its old content or all of the new."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON, as `write_text` does. Not-a-number and infinities become null."""
    write_text(path, as_json(data))


def as_json(data: Mapping[str, Any]) -> str:
    """Indented JSON, with null for not-a-number and infinities."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; empty where there is none, or none that can be read, which is said."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s cannot be read and is passed over: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value


def disk_full(error: BaseException) -> bool:
    """Return whether a full disk caused an error; torch, safetensors and tokenizers have classes of their own.

    An error that was raised while another was handled counts too: `torch.save` fails once more when it closes the
    archive that it could not write.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        text = str(cause)
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(item in text for item in _NO_ROOM):
            return True
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return False


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows syncs what is open for writing only
        os.fsync(file.fileno())


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


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """`whole_folder` for what a command makes, which says so where the disk is full.

    Yields:
        An empty folder beside `final`.

    Raises:
        RunError: The disk is full; nothing is left of it.
    """
    try:
        with whole_folder(final) as temporary:
            yield temporary
    except PhiloraError:
        raise
    except Exception as error:
        if not disk_full(error):
            raise
        free = free_bytes(final)
        todo = f"Free some space ({free:,} bytes are free), or write to another disk; nothing of it was kept"
        raise RunError(fault("disk", "folder", str(final), f"room to write to it: {error}", todo)) from error


def not_writable(where: str, name: str, path: Path, error: OSError | ValueError) -> str:
    """The message for a folder that the system does not let be made or written to."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return fault(where, name, str(path), f"a folder that can be written to: {why}", "Give another place")


def unwritable(folder: Path) -> OSError | ValueError | None:
    """Why a folder cannot be made or written to; None: it can.

    Args:
        folder: It need not exist; then the nearest folder above it that does is tried, with an empty folder that is
            removed again.
    """
    deepest = folder / "checkpoints" / f"{TEMPORARY_PREFIX}checkpoints" / "checkpoint-1000000" / MANIFEST_NAME
    try:
        if folder.is_symlink() and not folder.exists():
            return FileExistsError(errno.EEXIST, f"it is a link to {folder.readlink()}, which is not there")
        with contextlib.suppress(FileNotFoundError):
            deepest.absolute().lstat()  # a name that is too long, a zero byte, a file where a folder is to be
        place = folder.absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            return NotADirectoryError(errno.ENOTDIR, f"{place} is no folder")
        if not os.access(place, os.W_OK | os.X_OK):
            with contextlib.suppress(OSError, AttributeError):
                if os.statvfs(place).f_flag & os.ST_RDONLY:
                    return OSError(errno.EROFS, f"{place} is read-only")
            return PermissionError(errno.EACCES, f"{place} may not be written to")
        Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=place)).rmdir()
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        return error
    return None


def is_taken(path: Path) -> bool:
    """Return whether something stands where a new folder is to be written; an empty folder does not count."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def publish(temporary: Path, final: Path) -> None:
    """Sync every file below `temporary` and rename the folder to `final`; a folder of that name is replaced.

    Files get the ordinary permissions that the folder has: safetensors writes its own for the owner alone.

    A process that ends between the two renames of a replacement leaves the old folder under a temporary name, from
    which `remove_leftovers` brings it back.
    """
    ordinary = temporary.stat().st_mode & 0o666
    for root, _, names in os.walk(temporary):
        for name in names:
            file = Path(root, name)
            file.chmod(stat.S_IMODE(file.stat().st_mode) | ordinary)
            sync_file(file)
        _sync(Path(root))
    if final.exists():
        old = final.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}{_OLD}{final.name}")
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
    """Sync each file of a folder, then write and sync its manifest: size and SHA-256 of each, and `facts`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_NAME:
            sync_file(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    content = {"format": 2, "files": files, **(facts or {})}
    write_json(folder / MANIFEST_NAME, {**content, "sha256": hashlib.sha256(as_json(content).encode()).hexdigest()})


def faults_of(folder: Path) -> list[str]:
    """Return what is wrong with a sealed folder; empty when every file in its manifest is as it was written.

    Files that are not in the manifest (`foreign_files`) change nothing about those that are.
    """
    manifest = folder / MANIFEST_NAME
    try:
        text = manifest.read_text(encoding="utf-8")
        content = json.loads(text)
        files = content["files"]
        if content["format"] != 1:  # the first format said nothing of itself
            said = content.pop("sha256")
            if said != hashlib.sha256(as_json(content).encode()).hexdigest() or text != as_json(
                {**content, "sha256": said}
            ):
                return [f"{MANIFEST_NAME} was changed after it was written"]
        expected = {str(name): (int(item["bytes"]), str(item["sha256"])) for name, item in files.items()}
    except FileNotFoundError:
        return [f"{MANIFEST_NAME} is missing: it was not written to the end"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return [f"{MANIFEST_NAME} cannot be read"]
    return [found for name, (size, digest) in expected.items() if (found := _fault_of(folder, name, size, digest))]


def _fault_of(folder: Path, name: str, size: int, digest: str) -> str | None:
    """Return what is wrong with one file of a manifest."""
    path = folder / name
    if not is_inside(name):
        return f"{name} lies outside the folder"
    try:
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes in place of {size}"
        return None if _digest(path) == digest else f"{name} was changed after it was written"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"


def foreign_files(folder: Path) -> list[str]:
    """Files in a sealed folder that its manifest does not name, such as a note or what a file manager left."""
    try:
        known = {MANIFEST_NAME, *json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return sorted(name for name in names if name not in known)


def is_inside(name: str) -> bool:
    """Return whether a path name from a file stays in the folder that the file describes."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return bool(parts.parts) and not parts.is_absolute() and ".." not in parts.parts and ":" not in parts.parts[0]


def indexed_files(index: Path) -> list[str]:
    """The files that the index of a sharded model names, each beside it.

    Raises:
        ModelError: The index cannot be read, or names a file outside its folder or one that is missing.
    """
    try:
        names = {str(value) for value in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = "the index of a sharded model"
        raise ModelError(fault(str(index), "content", f"{type(error).__name__}: {error}", expected)) from error
    todo = "Copy the whole model again"
    faults = [
        fault(str(index), "weight_map", name, "a file in the same folder, which is there", todo)
        for name in sorted(names)
        if not is_inside(name) or not (index.parent / name).is_file()
    ]
    if faults:
        raise ModelError(one_per_line(faults))
    return sorted(names)


class Found(NamedTuple):
    """The newest complete checkpoint of a run, if any, and those passed over with the reason."""

    folder: Path | None
    passed_over: list[tuple[Path, str]]


PASSED_OVER_PREFIX = "passed-over-"
"""Put before the name of a checkpoint that a run passed over when it went on: nothing of philora's deletes it."""


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that was passed over, so that no later checkpoint replaces or removes it; its new place."""
    number, aside = 1, path.with_name(f"{PASSED_OVER_PREFIX}{path.name}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{PASSED_OVER_PREFIX}{path.name}-{number}")
    path.rename(aside)
    return aside


def has_checkpoints(checkpoints: Path) -> bool:
    """Return whether a run has checkpoints, whole or not."""
    return bool(_numbered(checkpoints))


def how_to_go_on(checkpoints: Path) -> str:
    """Return how a run that ended continues, by what is on the disk: from a checkpoint, or from the start."""
    return "continue with --resume" if has_checkpoints(checkpoints) else "start it again"


def newest_whole(checkpoints: Path) -> Found:
    """Look for the newest checkpoint that is whole; every file of those looked at is read once."""
    passed_over: list[tuple[Path, str]] = []
    for _, path in reversed(_numbered(checkpoints)):
        faults = faults_of(path)
        if not faults:
            return Found(path, passed_over)
        passed_over.append((path, "; ".join(faults)))
    return Found(None, passed_over)


def _numbered(checkpoints: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run by their steps, in their order."""
    return sorted(
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in checkpoints.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal() and path.is_dir()
    )


def rotate(checkpoints: Path, newest: Path, keep: int | None, best: Path | None = None) -> None:
    """Remove the oldest checkpoints beyond `keep`, called when `newest` is complete. Each loses its name at once.

    What is ahead of `newest` was made by a run that has gone back since: it stays, and does not count.

    Args:
        checkpoints: The folder of checkpoints.
        newest: The one that was just written; it stays.
        keep: How many stay, `newest` and `best` included; None or 0: all.
        best: Stays as well.
    """
    if not keep or keep < 0:
        return
    numbered = _numbered(checkpoints)
    step = next(number for number, path in numbered if path == newest)
    behind = [path for number, path in numbered if number < step]
    removable = [path for path in behind if best is None or path.resolve() != best.resolve()]
    for path in removable[: max(0, len(behind) + 1 - keep)]:
        aside = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-removed-{path.name}")
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted process left half-written in `folder`; bring back what it was about to replace."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        final = folder / path.name.partition(_OLD)[2]
        if _OLD in path.name and not final.exists():
            path.rename(final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def bytes_in(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def free_bytes(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def missing_bytes(folder: Path, needed: int) -> int:
    """Return how many more bytes must be free where `folder` is, or will be, for `needed` to fit."""
    return max(0, needed - free_bytes(folder))


_held: set[int] = set()
"""Descriptors of held locks: a forked worker that outlives a killed run must not keep its folder locked."""


def _drop_locks() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_locks)


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_named(descriptor: int, path: Path) -> bool:
    """Return whether a file still has its name: who held the lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _locked(folder: Path) -> int:
    """The descriptor of a folder's lock file, locked.

    Raises:
        ConfigError: Another process holds it.
        OSError: The lock file cannot be made.
    """
    path = folder / LOCK_NAME
    while True:
        # Never emptied, and no link is followed: what it leads to is not the run's.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                logger.warning("%s cannot be locked (%s): see to it that no other run writes there.", folder, error)
                return descriptor
            os.close(descriptor)
            expected = "a folder that no other run is writing to"
            todo = "Wait for it, or give another training_config.output_dir"
            raise ConfigError(fault("train", "output_dir", str(folder), expected, todo)) from None
        except BaseException:
            os.close(descriptor)
            raise
        if os.name == "nt" or _is_named(descriptor, path):  # Windows does not remove what is open
            return descriptor
        os.close(descriptor)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process; the lock ends with the process, however it ends.

    Raises:
        ConfigError: Another process holds it.
        OSError: The lock file cannot be made.
    """
    descriptor = _locked(folder)
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------- adapters


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Of safetensors' header, as far as an adapter may hold them."""


def read_peft_tensors(folder: Path) -> dict[str, Tensor]:
    """Names, shapes and dtypes of the tensors of an adapter folder in PEFT's format, on the meta device.

    Only the header is read, whose length and offsets safetensors compares with the size of the file: what does not
    fit the model is refused before any memory is taken for it.

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
    tensors: dict[str, Tensor] = {}
    if not faults:
        try:
            if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
                raise ValueError("not an object")
        except (OSError, ValueError, RecursionError) as error:
            faults.append(fault(str(config), "content", str(error), "JSON as PEFT writes it"))
        try:
            with safe_open(weights, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    part = file.get_slice(name)
                    tensors[name] = torch.empty(part.get_shape(), dtype=_DTYPES[part.get_dtype()], device="meta")
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
            expected = "a whole safetensors file"
            faults.append(fault(str(weights), "content", str(error), expected, "Copy it again, or use a checkpoint"))
    if faults:
        raise AdapterError(one_per_line(faults))
    return tensors
