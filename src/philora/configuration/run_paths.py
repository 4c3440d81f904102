"""Current places of the paths that a run was started with, from the paths that its `run.json` records."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from philora.configuration.sections import HELPDESK

RECORD_NAME: Final = "run.json"
BUNDLED: Final = ("nano", HELPDESK)


class Place(NamedTuple):
    """The current location of a path of a run.

    Attributes:
        name: The path, or the given name if it is not a path (a hub id, `nano`) or was not found.
        tried: The paths where it was not found; empty if the name can be used.
    """

    name: str
    tried: tuple[str, ...] = ()


def is_path(name: str) -> bool:
    """Return whether a name can only be a path of this machine, not a hub id."""
    return name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") > 1


def current_place(folder: Path, record: Mapping[str, Any], written: Any, name: str) -> Place:
    """Return the current location of a configured path: as recorded, else relative to the start folder.

    Args:
        folder: The run folder.
        record: The content of its `run.json`.
        written: `training_config.output_dir` of its configuration.
        name: The path.
    """
    if name in BUNDLED:
        return Place(name)
    recorded = _recorded(record, name)
    given = Path(name).expanduser()
    candidates = [Path(recorded["absolute"])] if "absolute" in recorded else []
    if "relative" in recorded:
        candidates.append(Path(os.path.normpath(folder.absolute() / recorded["relative"])))
    if not recorded:
        candidates.append(given.absolute())
        started_in = _started_in(folder, written)
        if started_in is not None and not given.is_absolute():
            candidates.append(started_in / given)
    places = tuple(dict.fromkeys(map(str, candidates)))
    found = next((place for place in places if Path(place).exists()), None)
    if found is not None:
        return Place(found)
    return Place(name, places if recorded or is_path(name) else ())


def _recorded(record: Mapping[str, Any], name: str) -> Mapping[str, str]:
    paths = record.get("paths")
    found = paths.get(name) if isinstance(paths, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _started_in(folder: Path, written: Any) -> Path | None:
    """Return the folder in which a run without recorded paths was started, found from the run's own path."""
    if not isinstance(written, str) or Path(written).expanduser().is_absolute():
        return None
    parts, own = Path(os.path.normpath(written)).parts, folder.absolute().parts
    if ".." in parts or own[-len(parts) :] != parts:
        return None
    return Path(*own[: -len(parts)])


def with_current_places(folder: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[str, ...]]]:
    """Return the settings of a run with its paths as they are now; those found from the working folder stay as given.

    Args:
        folder: The run folder.
        given: The content of its `config.yaml`.

    Returns:
        The settings, and for every path that was not found the places looked at.
    """
    training = given.get("training_config")
    written = training.get("output_dir") if isinstance(training, Mapping) else None
    lost: dict[str, tuple[str, ...]] = {}
    try:  # not by files.checkpoint, which imports torch; resuming reads the record again and reports what is wrong
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        record = {}
    if not isinstance(record, Mapping):
        record = {}

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(item) for item in value]
        if isinstance(value, Mapping):
            return {**value, "path": found(value["path"])} if "path" in value else value
        if not isinstance(value, str):
            return value
        place = current_place(folder, record, written, value)
        if place.tried:
            lost[value] = place.tried
        return value if os.path.normpath(Path(value).expanduser().absolute()) == place.name else place.name

    result = dict(given)
    for section, keys in (("model", ("name_or_path", "adapter")), ("data", ("train", "eval"))):
        values = given.get(section)
        if isinstance(values, Mapping):
            result[section] = {**values, **{key: found(values[key]) for key in keys if key in values}}
    return result, lost
