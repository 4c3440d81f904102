"""Find where records come from: files, folders and hub datasets, read in batches with the location of every record.

The readers never hold a whole file. A JSONL line stays bytes until a worker parses it, so that parsing runs in
parallel with everything else; each record carries its place (`file:line`, or a row number) for messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from philora.configuration.sections import HELPDESK
from philora.dataset.datasets_library import hub_source, refuse_subset, saved_source
from philora.dataset.file_bytes import COMPRESSED, faults_located
from philora.dataset.json_files import is_object, read_json
from philora.dataset.records import Batch, Reading, Role, Source, refuse_split
from philora.dataset.splits import DEFAULT_SPLITS, choose_split, folder_splits
from philora.dataset.tables import read_csv, read_excel, read_parquet
from philora.errors import DataError, fault, nearest

if TYPE_CHECKING:
    from philora.configuration.sections import SourceConfig


Kind: TypeAlias = Literal["json", "csv", "parquet", "excel"]

_KINDS: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".xlsx": "excel",
}
_NOT_DATA = {"dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json", "README.md"}
_FILES_NAMED = 5


def resolve(config: SourceConfig, role: Role) -> Source:
    """Find what a source names: bundled set, file, folder, saved dataset or hub dataset.

    Args:
        config: the source; `path` is looked up on disk before the hub.
        role: decides the file of the bundled set and the default split of a hub dataset.

    Returns:
        The source with the fingerprint of its content: for files the sha256 of their bytes.

    Raises:
        DataError: nothing is there, it is of a kind philora does not read, or the hub cannot be reached.
    """
    if config.path == HELPDESK:
        return _bundled_source(config, role)
    path = Path(config.path).expanduser()
    if path.is_file():
        refuse_subset(config, "a file has no subsets")
        return _files_source(config, [path], config.path, Reading(role, config.split, {}))
    _refuse_pipe(path, config.path, "data")
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            refuse_subset(config, "a saved dataset has no subsets")
            return saved_source(config, path, role)
        return _folder_source(config, path, role)
    if _looks_local(config.path):
        raise DataError(_missing_file(path))
    return hub_source(config, role)


def _refuse_pipe(path: Path, given: str, where: str) -> None:
    """Refuse what is there and can be read once only: a pipe, `/dev/stdin`, `<(...)` of a shell.

    Raises:
        DataError: It is one.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        expected = "a file, which can be read again; this is a pipe or a device, which can be read once"
        raise DataError(fault(where, "path", given, expected, "Write it to a file first, and give that"))


def _bundled_source(config: SourceConfig, role: Role) -> Source:
    refuse_subset(config, "the bundled set has none")
    split = choose_split(HELPDESK, config.split, role, ["train", "eval"])
    file = Path(str(resources.files("philora"))) / "nano" / "helpdesk" / f"{split}.jsonl"
    return _files_source(config, [file], f"{HELPDESK}/{split}.jsonl", Reading(role, None, {}))


def _looks_local(path: str) -> bool:
    suffixes = Path(path).suffixes
    return (
        path.startswith((".", "/", "~"))
        or path.count("/") > 1
        or "\\" in path
        or any(suffix.lower() in (*_KINDS, *COMPRESSED) for suffix in suffixes)
    )


def _missing_file(path: Path) -> str:
    parent = path.parent
    todo = f"There is no folder {str(parent)!r}"
    if parent.is_dir():
        names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
        todo = nearest(path.name, names) or f"Its folder is {str(parent)!r}"
    return fault("data", "path", str(path), "a file or folder that exists", todo)


def _folder_source(config: SourceConfig, folder: Path, role: Role) -> Source:
    files, unread = _folder_files(folder)
    splits = folder_splits(folder, config.subset, files)
    in_some = {file for item in splits.values() for file in item}
    lost = [file for file in files if file not in in_some]
    if config.split is None and len(splits) == 1 and lost and not splits.keys() & set(DEFAULT_SPLITS[role]):
        # One split of another purpose, and files beside it: which of them is meant is not for us to guess.
        names = ", ".join(splits)
        expected = f"the name of a split, since this folder has only {names} (other files: {len(lost)})"
        raise DataError(fault(str(folder), "split", None, expected, "Give split, or a folder with the files to read"))
    split = choose_split(str(folder), config.split, role, list(splits))
    for name, others in splits.items():
        if name != split:
            unread[f"split {name} ({_names(others, folder)})"] = None
    if lost:
        unread[f"files in no split ({_names(lost, folder)})"] = None
    name = config.path if len(splits) == 1 else f"{config.path}[{split}]"
    return _files_source(config, splits[split], name, Reading(role, None, unread))


def _folder_files(folder: Path) -> tuple[list[Path], dict[str, None]]:
    """Return the files of a folder that a reader exists for, and the others, by name."""
    found = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _hidden(file, folder)]
    files = [item for item in found if _kind(item) is not None and item.name not in _NOT_DATA]
    if not files:
        raise DataError(fault("data", "path", str(folder), f"a folder with files of the kinds {', '.join(_KINDS)}"))
    others = [item for item in found if item not in set(files) and item.name not in _NOT_DATA]
    return files, {f"files of other kinds ({_names(others, folder)})": None} if others else {}


def _names(files: list[Path], folder: Path) -> str:
    names = [str(file.relative_to(folder)) for file in files]
    more = f" and {len(names) - _FILES_NAMED} more" if len(names) > _FILES_NAMED else ""
    return ", ".join(names[:_FILES_NAMED]) + more


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _kind(path: Path) -> Kind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
        if suffixes and suffixes[-1] in (".parquet", ".xlsx"):
            return None
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _files_source(config: SourceConfig, files: list[Path], name: str, reading: Reading) -> Source:
    for file in files:
        if _kind(file) is None:
            expected = f"a file of the kinds {', '.join(_KINDS)}"
            raise DataError(fault("data", "path", str(file), expected, _save_as(file)))
    digest = hashlib.sha256()
    for file in files:
        digest.update("".join(file.suffixes[-2:]).lower().encode())
        digest.update(_sha256(file))
        if reading.split is not None or _kind(file) == "excel" or is_object(file):
            digest.update(f"{reading.role} {reading.split}".encode())  # they choose among the lists of a file

    size = sum(file.stat().st_size for file in files)
    return Source(name, digest.hexdigest(), lambda: _read_files(files, reading), config.limit, size, reading.unread)


def _save_as(file: Path) -> str:
    """Return what to do with a file of a kind that is not read."""
    if file.suffix.lower() in (".xls", ".ods", ".numbers"):
        return "Open it and save it as .xlsx, or as CSV UTF-8"
    if file.suffix.lower() in (".txt", ".html", ".htm", ".mbox", ".eml"):
        return "docs/cookbook.md has recipes for exports of chats and e-mail; a table with tabs is renamed to .tsv"
    return "Unpack it" if file.suffix.lower() in (".zip", ".7z", ".bz2", ".xz", *COMPRESSED) else ""


def _sha256(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise DataError(fault("data", "path", str(file), f"a file that can be read ({error.strerror})")) from error


def _read_files(files: list[Path], reading: Reading) -> Iterator[Batch]:
    for file in files:
        kind = _kind(file)
        if kind in ("csv", "parquet"):
            refuse_split(file, reading)
        with faults_located(file):
            if kind == "json":
                yield from read_json(file, reading)
            elif kind == "csv":
                yield from read_csv(file)
            elif kind == "excel":
                yield from read_excel(file, reading)
            else:
                yield from read_parquet(file)
