"""Write the files of a run atomically, and check them when they are read.

A file or folder is written under a temporary name in the same directory, synced, then renamed. So a file that exists
under its final name is complete. A checkpoint also has a manifest of its files, which is written last.
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
"""In a checkpoint: state that exact resuming needs and transformers does not save."""
LOCK_NAME = ".lock"
TEMPORARY_PREFIX = ".saving-"
_OLD = "-old-"
_DISK_FULL = ("No space left", "iostream error", "PytorchStreamWriter failed", "unexpected pos", " requested and ")
"""Parts of the messages of torch, safetensors, tokenizers and numpy if a file cannot be written to its end."""


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or its parts one after another, in UTF-8. `path` has either its old content or all of the new."""
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
    """Return indented JSON, with null for not-a-number and infinities."""
    return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a small JSON file; empty if there is none or, with a warning, if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s cannot be read and is ignored: %s", path, error)
        return {}
    return value if isinstance(value, dict) else {}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file of JSON lines, without incomplete lines; none if there is no file.

    Lines end at a line feed alone: text may contain others of Unicode's line ends, such as U+2028.
    """
    found = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return None
    return value


def disk_full(error: BaseException) -> bool:
    """Return whether a full disk caused an error, also of the classes of torch, safetensors and tokenizers.

    The errors that it was raised from or during count too: `torch.save` fails a second time when it closes the archive
    that it could not write.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        text = str(cause)
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(item in text for item in _DISK_FULL):
            return True
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return False


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows syncs only files that are open for writing
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    if os.name == "nt":  # directories cannot be opened, and renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Create a temporary folder that replaces `final` when the block ends without an error.

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
    """Create the folder that a command writes, as `atomic_folder`, and explain an error of a full disk.

    Yields:
        An empty folder beside `final`.

    Raises:
        RunError: The disk is full. The temporary folder has been deleted.
    """
    try:
        with atomic_folder(final) as temporary:
            yield temporary
    except Exception as error:
        if isinstance(error, PhiloraError) or not disk_full(error):
            raise
        free = free_bytes(final)
        todo = f"Free some space ({free:,} bytes are free), or write to another disk; nothing was kept"
        raise RunError(fault("disk", "folder", str(final), f"free space for it: {error}", todo)) from error


def not_writable(where: str, name: str, path: Path, error: OSError | ValueError) -> str:
    """Return the message for a folder that cannot be created or written to."""
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return fault(where, name, str(path), f"a folder that can be written to: {why}", "Give another folder")


def unwritable(folder: Path) -> OSError | ValueError | None:
    """Return why a folder cannot be created or written to; None if it can.

    Args:
        folder: The folder. If it does not exist, its nearest existing parent is tried, with an empty folder that is
            removed again.
    """
    deepest = folder / "checkpoints" / f"{TEMPORARY_PREFIX}checkpoints" / "checkpoint-1000000" / MANIFEST_NAME
    try:
        if folder.is_symlink() and not folder.exists():
            return FileExistsError(errno.EEXIST, f"it is a link to {folder.readlink()}, which does not exist")
        with contextlib.suppress(FileNotFoundError):
            deepest.absolute().lstat()  # finds a name that is too long, a zero byte, a file in place of a folder
        absolute = folder.absolute()
        parent = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
        if not parent.is_dir():
            return NotADirectoryError(errno.ENOTDIR, f"{parent} is not a folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            with contextlib.suppress(OSError, AttributeError):
                if os.statvfs(parent).f_flag & os.ST_RDONLY:
                    return OSError(errno.EROFS, f"{parent} is read-only")
            return PermissionError(errno.EACCES, f"{parent} may not be written to")
        Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=parent)).rmdir()
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        return error
    return None


def is_taken(path: Path) -> bool:
    """Return whether a path for a new folder exists already, other than as an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def publish(temporary: Path, final: Path) -> None:
    """Sync every file below `temporary` and rename the folder to `final`, replacing a folder of that name.

    Files get the read and write permissions of the folder: safetensors writes files for the owner only.

    If the process ends between the two renames of a replacement, the old folder is left under a temporary name, and
    `remove_leftovers` restores it.
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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """Sync all files of a folder, then write its manifest: size and SHA-256 of every file, and `facts`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST_NAME:
            sync_file(path)
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    content = {"format": 2, "files": files, **(facts or {})}
    write_json(folder / MANIFEST_NAME, {**content, "sha256": hashlib.sha256(as_json(content).encode()).hexdigest()})


def faults_of(folder: Path) -> list[str]:
    """Return what is wrong with a sealed folder; empty if every file in its manifest is as it was written.

    Files that are not in the manifest (`foreign_files`) are ignored.
    """
    manifest = folder / MANIFEST_NAME
    try:
        text = manifest.read_text(encoding="utf-8")
        content = json.loads(text)
        files = content["files"]
        if content["format"] != 1:  # the first format has no digest of itself
            digest = content.pop("sha256")
            same = digest == hashlib.sha256(as_json(content).encode()).hexdigest()
            if not same or text != as_json({**content, "sha256": digest}):
                return [f"{MANIFEST_NAME} was changed after it was written"]
        expected = {str(name): (int(item["bytes"]), str(item["sha256"])) for name, item in files.items()}
    except FileNotFoundError:
        return [f"{MANIFEST_NAME} is missing: the checkpoint was not written completely"]
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
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        return None if _digest(path) == digest else f"{name} was changed after it was written"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"


def foreign_files(folder: Path) -> list[str]:
    """Return the files in a sealed folder that are not in its manifest, such as a note or a file manager's."""
    try:
        known = {MANIFEST_NAME, *json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())
    return sorted(name for name in names if name not in known)


def is_inside(name: str) -> bool:
    """Return whether a relative path read from a file stays inside the file's folder."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return bool(parts.parts) and not parts.is_absolute() and ".." not in parts.parts and ":" not in parts.parts[0]


def indexed_files(index: Path) -> list[str]:
    """Return the files that the index of a sharded model names.

    Raises:
        ModelError: The index cannot be read, or a file is missing or outside the index's folder.
    """
    try:
        names = {str(value) for value in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        expected = "the index of a sharded model"
        raise ModelError(fault(str(index), "content", f"{type(error).__name__}: {error}", expected)) from error
    todo = "Copy the complete model again"
    faults = [
        fault(str(index), "weight_map", name, "an existing file in the same folder", todo)
        for name in sorted(names)
        if not is_inside(name) or not (index.parent / name).is_file()
    ]
    if faults:
        raise ModelError(one_per_line(faults))
    return sorted(names)


class Found(NamedTuple):
    """The newest complete checkpoint of a run, if any, and the skipped ones with the reasons."""

    folder: Path | None
    passed_over: list[tuple[Path, str]]


PASSED_OVER_PREFIX = "passed-over-"
"""Prefix for the name of a checkpoint that was skipped on resuming. philora does not delete it."""


def set_aside(path: Path) -> Path:
    """Rename a skipped checkpoint, so that no later checkpoint replaces or removes it, and return its new path."""
    number, aside = 1, path.with_name(f"{PASSED_OVER_PREFIX}{path.name}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{PASSED_OVER_PREFIX}{path.name}-{number}")
    path.rename(aside)
    return aside


def has_checkpoints(checkpoints: Path) -> bool:
    """Return whether a run has checkpoints, complete or not."""
    return bool(_numbered(checkpoints))


def how_to_continue(checkpoints: Path) -> str:
    """Return how to continue a stopped run: from a checkpoint if there is one, or from the start."""
    return "continue with --resume" if has_checkpoints(checkpoints) else "start it again"


def newest_complete(checkpoints: Path) -> Found:
    """Find the newest complete checkpoint. Every file of the checkpoints that are checked is read once."""
    passed_over: list[tuple[Path, str]] = []
    for _, path in reversed(_numbered(checkpoints)):
        faults = faults_of(path)
        if not faults:
            return Found(path, passed_over)
        passed_over.append((path, "; ".join(faults)))
    return Found(None, passed_over)


def _numbered(checkpoints: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints of a run with their steps, in order."""
    return sorted(
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in checkpoints.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal() and path.is_dir()
    )


def rotate(checkpoints: Path, newest: Path, keep: int | None, best: Path | None = None) -> None:
    """Remove the oldest checkpoints beyond `keep`, after `newest` was written. A checkpoint is renamed before removal.

    Checkpoints with later steps than `newest` are from a run that was resumed at an earlier step. They are kept and not
    counted.

    Args:
        checkpoints: The folder of checkpoints.
        newest: The checkpoint that was just written; it is kept.
        keep: How many are kept, `newest` and `best` included; None or 0 for all.
        best: Another checkpoint that is kept.
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
    """Delete temporary files that an interrupted process left in `folder`; restore a folder that it was replacing."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        final = folder / path.name.partition(_OLD)[2]
        if _OLD in path.name and not final.exists():
            path.rename(final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def bytes_in(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    absolute = folder.absolute()
    return shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free


def missing_bytes(folder: Path, needed: int) -> int:
    """Return how many more bytes must be free on the disk of `folder` for `needed` to fit."""
    return max(0, needed - free_bytes(folder))


_held: set[int] = set()
"""Descriptors of held locks. A forked worker closes them, so that it does not keep the lock of a killed run."""


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
    """Return whether a lock file still has its name: the previous holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _locked(folder: Path) -> int:
    """Lock a folder's lock file, and return its descriptor.

    Raises:
        ConfigError: Another process holds the lock.
        OSError: The lock file cannot be created.
    """
    path = folder / LOCK_NAME
    while True:
        # The file is not truncated and a link is not followed, since its target is not the run's.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                logger.warning("%s cannot be locked (%s): make sure that no other run writes there.", folder, error)
                return descriptor
            os.close(descriptor)
            expected = "a folder that no other run is writing to"
            todo = "Wait for it, or give another training_config.output_dir"
            raise ConfigError(fault("train", "output_dir", str(folder), expected, todo)) from None
        except BaseException:
            os.close(descriptor)
            raise
        if os.name == "nt" or _is_named(descriptor, path):  # Windows does not remove an open file
            return descriptor
        os.close(descriptor)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a run folder for this process. The lock ends with the process, however it ends.

    Raises:
        ConfigError: Another process holds the lock.
        OSError: The lock file cannot be created.
    """
    descriptor = _locked(folder)
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Dtypes of safetensors' header that an adapter can have."""


def read_peft_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter folder in PEFT's format by name, on the meta device.

    Only the header is read, whose length and offsets safetensors compares with the size of the file. So an adapter that
    does not fit the model is refused before memory is allocated.

    Raises:
        AdapterError: The folder is no such adapter, or one of its files cannot be read.
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
            expected = "a complete safetensors file"
            faults.append(fault(str(weights), "content", str(error), expected, "Copy it again, or use a checkpoint"))
    if faults:
        raise AdapterError(one_per_line(faults))
    return tensors
