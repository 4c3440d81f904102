"""Find an adapter and its base model from the argument RUN_OR_ADAPTER of the commands."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError

from philora.configuration.run_paths import Place, is_path
from philora.errors import AdapterError, ModelError, fault, nearest
from philora.families import find
from philora.files.links import refuse_leading_out
from philora.models.loading import local_path
from philora.models.run_folder import TrainedRun, is_run, resume_command, run_of
from philora.runtime.hub import HubPath, adapter_subfolders, download_adapter, parse_hub_path

logger = logging.getLogger("philora.run")

_NEVER_AN_ADAPTER = (".yaml", ".json", ".jsonl", ".html", ".log", ".md")


class AdapterSource(NamedTuple):
    """An adapter and its base.

    Attributes:
        path: Folder in PEFT's format, or a file in loralib's.
        base: Folder or hub id of the base model; None if it is unknown.
        run: The run folder that the adapter belongs to, if any.
        tried: Paths where the base was not found; empty if it was found or is a hub id.
        revision: Branch, tag or commit of a base on the Hub, from the run or PEFT's configuration.
    """

    path: Path
    base: str | None
    run: Path | None = None
    tried: tuple[str, ...] = ()
    revision: str | None = None


def find_adapter(source: str | Path, base: str | None = None, *, unfinished: bool = True) -> AdapterSource:
    """Find a run folder's adapter, an adapter folder, a checkpoint, a loralib file or an adapter on the Hub.

    Args:
        source: The argument. On the Hub a subfolder and a revision can follow the id:
            `OWNER/NAME/SUB/FOLDER@REVISION`.
        base: The base model if it was given; default: the run's, or the one that the adapter names.
        unfinished: Use the newest complete checkpoint of a run that has not ended, with a warning, instead of refusing.

    Raises:
        AdapterError: There is no adapter, or its folder has a link that leads out of it.
        ConfigError: The model section of the run's configuration cannot be read.
    """
    path = Path(source).expanduser()
    _refuse_file_inside(path)
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        path = _adapter_in(path, unfinished)
    elif not path.exists():
        path = _download(str(source))
    if path.is_dir():
        refuse_leading_out(path, AdapterError)
    run = run_of(path) if path.is_dir() else None
    revision = None
    if base is not None:
        place = Place(local_path(base))
    elif run is not None:
        trained = TrainedRun(run)
        place, revision = trained.base(), trained.model.revision
    else:
        place, revision = _named_base(path)
    return AdapterSource(path, local_path(place.name) if place.name else None, run, place.tried, revision)


def require_base(found: AdapterSource) -> str:
    """Return the base of an adapter, after checking that it exists.

    Raises:
        AdapterError: The adapter does not name a base.
        ModelError: The base is a folder that does not exist.
    """
    if found.base is None:
        expected = "the base model, which the adapter does not name"
        raise AdapterError(fault(str(found.path), "base", None, expected, "Name it: --base MODEL"))
    if found.tried:
        expected = f"the folder of the base model; there is none at {', '.join(found.tried)}"
        todo = "Give its current folder: --base FOLDER"
        raise ModelError(fault(str(found.run or found.path), "base", found.base, expected, todo))
    return found.base


def _refuse_file_inside(path: Path) -> None:
    """Refuse a file of a run or of an adapter folder, where the folder itself is meant."""
    if not path.is_file():
        return
    folder = path.absolute().parent
    meant: Path | None = None
    if (folder / "adapter_config.json").is_file():
        meant = (run_of(folder) if folder.name == "adapter" else None) or folder
    elif path.suffix in _NEVER_AN_ADAPTER and is_run(folder):
        meant = folder
    if meant is not None:
        expected = "a run folder, or a folder with adapter_config.json, not a file in it"
        raise AdapterError(fault("adapter", "source", str(path), expected, f"Did you mean {meant}?"))


def _adapter_in(folder: Path, unfinished: bool) -> Path:
    """Return the adapter of a run.

    Raises:
        AdapterError: The folder is not a run, with a suggestion; or the run has no adapter that can be used.
    """
    run = TrainedRun(folder)
    if run.has_ended:
        return run.adapter
    if not is_run(folder):
        expected = "a run folder, or a folder with adapter_config.json"
        meant = _meant(folder)
        todo = f"Did you mean {meant}?" if meant is not None else "Train one: philora train CONFIG"
        raise AdapterError(fault("adapter", "source", str(folder), expected, todo))
    checkpoint, command = run.newest_checkpoint(), resume_command(folder)
    if checkpoint is None:
        expected = "a run with an adapter; this run has not ended and has no complete checkpoint"
        raise AdapterError(fault("adapter", "source", str(folder), expected, f"Resume it: {command}"))
    if not unfinished:
        todo = f"Resume it: {command}; or name its newest complete checkpoint: {checkpoint}"
        raise AdapterError(fault("adapter", "source", str(folder), "a run that has ended", todo))
    logger.warning(
        "%s has not ended: its newest complete checkpoint %s is used; %s resumes it", folder, checkpoint.name, command
    )
    return checkpoint


def _meant(folder: Path) -> Path | None:
    """Return the run that contains a folder, else the newest run in it, else an adapter in it."""
    around = [parent for parent in (folder.absolute().parent, folder.absolute().parent.parent) if is_run(parent)]
    if around:
        return around[0]
    inside = [file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/config.yaml")]
    runs = sorted((run for run in inside if is_run(run)), key=lambda run: run.stat().st_mtime)
    if runs:
        return runs[-1]
    adapters = [file.parent for depth in ("*", "*/*") for file in folder.glob(f"{depth}/adapter_config.json")]
    return max(adapters, key=_step_and_name, default=None)


def _step_and_name(folder: Path) -> tuple[int, str]:
    """Return a sort key: checkpoints in the order of their steps, other folders before them by name."""
    step = folder.name.removeprefix("checkpoint-")
    return (int(step) if step.isdecimal() else -1, str(folder))


def _named_base(path: Path) -> tuple[Place, str | None]:
    """Return the base that an adapter's configuration names, and its revision; an empty name if there is none."""
    if not path.is_dir():
        return Place(""), None
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        named, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (OSError, ValueError, AttributeError) as error:
        expected = "JSON as PEFT writes it"
        raise AdapterError(fault(str(path / "adapter_config.json"), "content", str(error), expected)) from error
    name = str(named) if named else ""
    if not name or Path(name).expanduser().exists() or not is_path(name):
        return Place(name), str(revision) if revision else None
    if Path(name).parts[-3:] == ("philora", "nano", "model"):  # of another installation
        return Place("nano"), None
    return Place(name, (str(Path(name).expanduser().absolute()),)), None


def _download(name: str) -> Path:
    expected = "a run folder, an adapter folder, a loralib file, or an adapter on the Hugging Face Hub"
    place = None if name.startswith((".", "/", "~")) else parse_hub_path(name)
    here = nearest(Path(name).name, [file.name for file in Path(name).expanduser().parent.glob("*")])
    if place is None:
        raise AdapterError(fault("adapter", "source", name, expected, here))
    try:
        folder = download_adapter(place)
    except (HFValidationError, OSError) as error:  # the hub's other errors are OSErrors
        todo = here or f"Check the path, or your login. The hub says: {' '.join(str(error).split())[:200]}"
        raise AdapterError(fault("adapter", "source", name, expected, todo)) from error
    if not (folder / "adapter_config.json").is_file():
        expected = "a folder of the Hub with adapter_config.json"
        raise AdapterError(fault("adapter", "source", name, expected, _others(place)))
    return folder


def _others(place: HubPath) -> str:
    """Return a sentence with the adapter folders that the repository has."""
    found = [f"{place.repo_id}/{subfolder}" if subfolder else place.repo_id for subfolder in adapter_subfolders(place)]
    suffix = f"@{place.revision}" if place.revision else ""
    return f"It has: {', '.join(name + suffix for name in found[:5])}" if found else ""


def shown_base(base: str) -> str:
    """Return a base's name for people and for files that others get: a Hub id unchanged, of a folder the last part."""
    if local_path(base) == local_path("nano"):
        return "nano"
    path = Path(base).expanduser()
    return path.resolve().name if path.is_dir() else base


def licence(base: str | None) -> str | None:
    """Return the licence of a base from the card in its folder; Microsoft's Phi models are all under MIT."""
    if base is None:
        return None
    readme = Path(local_path(base)) / "README.md"
    if readme.is_file():
        card = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True)
        return str(found) if (found := getattr(card.data, "license", None)) else None
    return "mit" if find(base) is not None else None
