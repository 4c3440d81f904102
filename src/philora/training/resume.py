"""Start or resume a run in a folder: its lock, what it was started with, its newest complete checkpoint.

`run.json` in the run folder records what a run was started with besides its configuration: digests of the files of base
model and first adapter, a fingerprint of the data, and the choices for this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from philora.configuration.config import load_config
from philora.configuration.run_paths import RECORD_NAME
from philora.configuration.sections import Config, SourceConfig
from philora.configuration.writing import dump_yaml, without_secrets
from philora.dataset import PreparedData
from philora.errors import ConfigError, PhiloraError, RunError, fault, one_per_line
from philora.files import checkpoint
from philora.files.links import refuse_leading_out
from philora.models import loading as models
from philora.models.locate import find_adapter
from philora.models.run_folder import HELD_OUT_NAME
from philora.native import build as native
from philora.runtime import processes

logger = logging.getLogger("philora.run")

EARLIER_LEARNING_RATE = 2e-4
"""The default of runs whose record does not list the settings that philora chose."""
_HASHED_WHOLE_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Continued:
    """A run that is resumed.

    Attributes:
        checkpoint: The newest complete checkpoint; None if there is none yet, so that the run starts again.
        facts: The content of `run.json`; empty if there is none.
        forced: Whether differences are ignored.
        changed: Whether the configuration differs, so that earlier choices are not valid.
        config: The configuration to resume with.
        passed_over: Newer checkpoints that are not complete.
    """

    checkpoint: Path | None
    facts: Mapping[str, Any]
    forced: bool
    changed: bool
    config: Config
    passed_over: tuple[Path, ...] = ()

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Return batch, recomputation, row length and threads to resume with; empty if they are to be chosen again."""
        if self.changed or self.facts.get("processes", processes.count()) != processes.count():
            return {}  # such as a process's share of a step
        if self.checkpoint is not None:
            found = checkpoint.read_json(self.checkpoint / checkpoint.STATE_NAME).get("chosen")
            if isinstance(found, Mapping):
                return found
        chosen = self.facts.get("chosen")
        return chosen if isinstance(chosen, Mapping) else {}


_FOREIGN = re.compile(r"\.DS_Store|\._.*|\.nfs.*|\.directory|Thumbs\.db|desktop\.ini|lost\+found", re.IGNORECASE)
"""Files that file managers and file systems leave in any folder."""
_ATTEMPTS = 20
_OF_A_RUN = ("config.yaml", RECORD_NAME, "train.log", "metrics.jsonl", "trainer_state.json", HELD_OUT_NAME)


class Claim:
    """A new run's folder, locked by this process; what was created in it is removed unless the run starts.

    Attributes:
        kept: Whether the run has started, so that everything is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept = False
        self._made: list[Path] = []

    def take(self, source: str, held: contextlib.ExitStack) -> None:
        """Create the folder and lock it.

        `held` gets the lock, and the removal of what was created, which runs before the lock is released.

        Raises:
            ConfigError: It is not empty, another process has locked it, or it cannot be written to.
            RunError: The disk is full.
        """
        open_fresh(self.folder, source)
        if self.folder.is_dir():
            refuse_leading_out(self.folder, ConfigError)
        try:
            self._lock(held)
        except PhiloraError:
            raise
        except (OSError, ValueError) as error:
            if checkpoint.disk_full(error):
                todo = "Free some space, then start it again"
                expected = f"free space to write to it: {error}"
                raise RunError(fault("run", "output_dir", str(self.folder), expected, todo)) from error
            text = checkpoint.not_writable(source, "training_config.output_dir", self.folder, error)
            raise ConfigError(text) from error
        open_fresh(self.folder, source)  # another run may have used it meanwhile
        held.callback(self._undo)

    def _lock(self, held: contextlib.ExitStack) -> None:
        """Create the folder and lock it; try again if another process that had created it has just removed it."""
        for attempt in range(_ATTEMPTS):
            try:
                self._make()
                held.enter_context(checkpoint.run_lock(self.folder))
                return
            except FileNotFoundError:
                if attempt == _ATTEMPTS - 1:
                    raise

    def begin(self, config: Config) -> None:
        """Write `config.yaml`, with which the run can be resumed, over the leftovers of a run that saved nothing."""
        checkpoint.remove_leftovers(self.folder)
        checkpoint.remove_leftovers(self.folder / "checkpoints")
        checkpoint.write_text(self.folder / "config.yaml", dump_yaml(config))

    def _make(self) -> None:
        missing = [parent for parent in (self.folder, *self.folder.parents) if not parent.exists()]
        for entry in reversed(missing):
            try:
                entry.mkdir()
                self._made.append(entry)
            except FileExistsError:
                if not entry.is_dir():
                    raise

    def _undo(self) -> None:
        if self.kept:
            return
        for name in ("config.yaml", "train.log", checkpoint.LOCK_NAME):
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()
        for entry in reversed(self._made):
            with contextlib.suppress(OSError):  # it has other files by now
                entry.rmdir()


def open_fresh(folder: Path, source: str) -> None:
    """Check that a run may start in a folder: it is new, empty, or that of a run which ended before it saved anything.

    Raises:
        ConfigError: It is a file, is not empty, or cannot be written to.
    """
    name = "training_config.output_dir"
    refused = checkpoint.unwritable(folder)
    if isinstance(refused, NotADirectoryError) and folder.is_file():
        raise ConfigError(fault(source, name, str(folder), "a folder, not a file"))
    if refused is not None:
        raise ConfigError(checkpoint.not_writable(source, name, folder, refused))
    if not folder.is_dir() or not (there := _content(folder)) or _saved_nothing(folder, there):
        return
    what = "another run" if "config.yaml" in there else "other files"
    expected = f"a new or empty folder; this one holds {what}"
    resumable = "config.yaml" in there and checkpoint.has_checkpoints(folder / "checkpoints")
    todo = f"Continue with --resume, or give another {name}" if resumable else f"Give another {name}"
    raise ConfigError(fault(source, name, str(folder), expected, todo))


def _content(folder: Path) -> set[str]:
    """Return the names in a folder, without leftovers of a killed run, a file manager or a file system."""
    names = {path.name for path in folder.iterdir() if not path.name.startswith(checkpoint.TEMPORARY_PREFIX)}
    alone = {name for name in names if name == checkpoint.LOCK_NAME and not (folder / name).is_symlink()}
    return {name for name in names - alone if not _FOREIGN.fullmatch(name)}


def _saved_nothing(folder: Path, names: set[str]) -> bool:
    """Return whether everything in a folder was written by a run that ended before its first checkpoint."""
    files = names - {"checkpoints"}
    if not files <= set(_OF_A_RUN) or not (folder / checkpoint.LOCK_NAME).is_file():
        return False  # a run creates its lock first: a config.yaml without one was not written by a run
    if any((folder / name).is_symlink() for name in names):
        return False
    kept = ("checkpoint-", checkpoint.PASSED_OVER_PREFIX)
    return "checkpoints" not in names or not any(
        path.name.startswith(kept) for path in (folder / "checkpoints").iterdir()
    )


def open_to_resume(folder: Path, config: Config, *, force: bool, held: contextlib.ExitStack) -> Continued:
    """Lock a run folder and find the checkpoint that its run resumes from.

    Args:
        folder: The run folder.
        config: The configuration to resume with.
        force: Continue even if that differs.
        held: Gets the lock.

    Raises:
        ConfigError: There is no run, another process has locked it, none of its checkpoints is complete, it is complete
            without checkpoints, or it was started with another configuration: one line for every difference.
    """
    name = "training_config.output_dir"
    refused = checkpoint.unwritable(folder)
    if refused is not None:
        raise ConfigError(checkpoint.not_writable(config.source, name, folder, refused))
    if not (folder / "config.yaml").is_file():
        expected = "a folder with a run to resume"
        raise ConfigError(fault(config.source, name, str(folder), expected, "Start it without --resume"))
    refuse_leading_out(folder, ConfigError)
    held.enter_context(checkpoint.run_lock(folder))
    checkpoint.remove_leftovers(folder)
    checkpoint.remove_leftovers(folder / "checkpoints")
    facts = checkpoint.read_json(folder / RECORD_NAME)
    then = load_config(folder, needs_files=False)
    config = _with_recorded_rate(config, then, facts)
    compared = _at_recorded_paths(config, then) if facts else config  # facts tell the content apart
    before, now = (without_secrets(entry.to_dict()) for entry in (then, compared))
    now["training_config"]["output_dir"] = before["training_config"]["output_dir"]  # the run may have moved
    differences = _differences(before, now)
    _refuse(config.source, differences, force)
    found = _newest(folder, config.source)
    passed_over = tuple(path for path, _ in found.passed_over)
    return Continued(found.folder, facts, force, bool(differences), config, passed_over)


def _newest(folder: Path, source: str) -> checkpoint.Found:
    """Return the newest complete checkpoint, and warnings about the others.

    Raises:
        ConfigError: There are checkpoints but none is complete, or the run is complete and has none.
    """
    found = checkpoint.newest_complete(folder / "checkpoints")
    name = "training_config.output_dir"
    if found.folder is None and found.passed_over:
        damaged = "; ".join(f"{path.name}: {why}" for path, why in found.passed_over)
        expected = f"a run with a complete checkpoint; none of its {len(found.passed_over)} is. {damaged}"
        todo = (
            f"Restore one of them from a copy. To start again, move {folder / 'checkpoints'} away and start the run "
            f"without --resume, or give another {name}"
        )
        raise ConfigError(fault(source, name, str(folder), expected, todo))
    for path, why in found.passed_over:
        logger.warning("%s is skipped: %s", path, why)
    if found.folder is None:
        if (folder / "adapter").exists():
            expected = "a run with a checkpoint to resume from; this one has an adapter and no checkpoints"
            todo = f"Give another {name}; with model.adapter: {folder} a run starts from this adapter"
            raise ConfigError(fault(source, name, str(folder), expected, todo))
        logger.warning("%s has no checkpoint yet; the run starts again.", folder)
    elif foreign := checkpoint.foreign_files(found.folder):
        logger.warning("%s has %s, which does not belong to the run and is kept.", found.folder, ", ".join(foreign))
    return found


def keep_passed_over(continued: Continued) -> None:
    """Rename the checkpoints that were skipped, so that the run does not replace them."""
    for path in continued.passed_over:
        aside = checkpoint.set_aside(path)
        logger.warning("%s is kept as %s; delete it if you do not need it.", path, aside.name)


def _at_recorded_paths(config: Config, then: Config) -> Config:
    """Return the configuration with the run's paths where model, adapter or data are at another place now."""

    def at(before: Any, now: Any) -> Any:
        if isinstance(before, SourceConfig) and isinstance(now, SourceConfig):
            return replace(now, path=at(before.path, now.path))
        if isinstance(before, tuple) and isinstance(now, tuple) and len(before) == len(now):
            return tuple(map(at, before, now))
        if not isinstance(before, str) or not isinstance(now, str) or not Path(now).expanduser().exists():
            return now
        old = Path(before).expanduser()
        return before if not old.exists() or old.samefile(Path(now).expanduser()) else now

    model = {name: at(getattr(then.model, name), getattr(config.model, name)) for name in ("name_or_path", "adapter")}
    data = {name: at(getattr(then.data, name), getattr(config.data, name)) for name in ("train", "eval")}
    return replace(config, model=replace(config.model, **model), data=replace(config.data, **data))


def _with_recorded_rate(config: Config, then: Config, facts: Mapping[str, Any]) -> Config:
    """Return the configuration with the run's learning rate, if philora chose it then and would choose it now."""
    name, key = "learning_rate", "training_config.learning_rate"
    recorded, rule = then.training_config.get(name), facts.get("automatic", {}).get(key)
    given = config.training_config.get(name)
    # A run without a record of it has the earlier default; one that was killed before it wrote any has no facts.
    chosen = rule is not None or ("automatic" not in facts and (not facts or recorded == EARLIER_LEARNING_RATE))
    if not chosen or given not in (("auto", recorded) if rule else ("auto",)):
        return config
    return replace(
        config,
        training_config=config.training_config | {name: recorded},
        origins={**config.origins, key: rule or "auto: as at the start of the run"},
    )


def check_facts(continued: Continued, facts: Mapping[str, Any], folder: Path) -> None:
    """Compare the facts of a resumed run with those of its start.

    Raises:
        ConfigError: Model, adapter, data or the number of processes differ: one line for every difference.
    """
    if not continued.facts:
        return
    differences: list[tuple[str, Any, Any]] = []
    for section in ("model", "adapter", "data", "processes"):
        differences += _differences(continued.facts.get(section), facts.get(section), section)
    # A record without a commit was written where none was known.
    differences = [found for found in differences if found[0].rpartition(".")[2] != "commit" or found[1] is not None]
    _refuse(str(folder), differences, continued.forced)
    for key, then, now in _differences(continued.facts.get("computes"), facts["computes"], "computes"):
        logger.warning("%s was %s and is %s: the run continues, but not bit for bit.", key, then, now)


def _refuse(where: str, differences: list[tuple[str, Any, Any]], force: bool) -> None:
    if differences and not force:
        todo = "--resume=force continues anyway"
        faults = [
            fault(where, key, now, f"the value that the run was started with: {then!r}", todo)
            for key, then, now in differences
        ]
        raise ConfigError(one_per_line(faults))
    for key, then, now in differences:
        logger.warning("%s is %r, but the run was started with %r; it continues as forced.", key, now, then)


def _differences(then: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        found = []
        for key in {**then, **now}:
            found += _differences(then.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if then == now else [(path, then, now)]


def facts_of(config: Config, data: PreparedData) -> dict[str, Any]:
    """Return the facts of a run's start, which are compared when it resumes.

    Cost:
        Reads the first mebibyte and 64 further blocks of every file of the model, whatever its size.
    """
    report = data.report.to_dict()
    adapter = config.model.adapter
    if adapter is not None and Path(adapter).expanduser().is_dir():  # it may be named by its run
        adapter = str(find_adapter(adapter).path)
    return {
        "format": 1,
        "model": _files(models.local_path(config.model.name_or_path), config.model.revision, "config.json"),
        "adapter": None if adapter is None else _files(adapter, None, "adapter_config.json"),
        "data": {
            "fingerprint": data.fingerprint,
            "rows": {name: report[name]["rows"] for name in ("train", "eval") if report.get(name)},
            "tokens": {name: report[name]["tokens"] for name in ("train", "eval") if report.get(name)},
        },
        "automatic": {key: origin for key, origin in config.origins.items() if origin.startswith("auto: ")},
        "processes": processes.count(),
        "computes": {"torch": torch.__version__, "between the products": native.describe()},
    }


def _files(name: str, revision: str | None, file: str) -> dict[str, Any]:
    """Return digests of the files in a folder by name; for an id on the Hub the commit of a file from there."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        cached = try_to_load_from_cache(name, file, revision=revision)
        return {"id": name, "commit": Path(cached).parent.name if isinstance(cached, str) else None}
    kinds = (".safetensors", ".bin", ".json", ".model", ".jinja")
    return {path.name: _sampled(path) for path in sorted(folder.iterdir()) if path.suffix in kinds and path.is_file()}


def _sampled(path: Path) -> str:
    """Return the SHA-256 of a file's size, its first mebibyte and 64 blocks spread evenly over the rest."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_HASHED_WHOLE_BYTES))
        if size > _HASHED_WHOLE_BYTES:
            step = max(1, (size - _HASHED_WHOLE_BYTES) // _SAMPLES)
            for start in range(_HASHED_WHOLE_BYTES, size, step):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Compute with this many threads inside the block: sums in another order round differently."""
    before = torch.get_num_threads()
    if number is not None and number != before:
        logger.info("%d threads, as at the start of the run", number)
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
