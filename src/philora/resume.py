"""Whether a run may begin in a folder or go on there: its lock, what it was started with, its newest whole checkpoint.

`run.json` in the run folder holds what a run was started with besides its configuration: the base model and the
adapter it starts from by their files, the dataset by its content, and what was chosen for this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from philora import checkpoint, models, native, processes
from philora.config import Config, load_config, without_secrets
from philora.data import PreparedData
from philora.errors import ConfigError, fault, one_per_line

logger = logging.getLogger("philora.run")

FACTS_NAME = "run.json"
EARLIER_LEARNING_RATE = 2e-4
"""The default of runs whose record does not say which settings philora chose."""
_HASHED_WHOLE_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Continued:
    """Where a run goes on.

    Attributes:
        checkpoint: The newest whole checkpoint; None: the run begins again.
        facts: What `run.json` says; empty where there is none.
        forced: Whether differences are to be passed over.
        changed: Whether the configuration differs, so that what was chosen for the old one does not hold.
        config: The configuration to go on with.
    """

    checkpoint: Path | None
    facts: Mapping[str, Any]
    forced: bool
    changed: bool
    config: Config

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Batch, recomputation, row length and threads that the run goes on with; empty: to be chosen."""
        if self.changed or self.facts.get("processes", processes.count()) != processes.count():
            return {}  # a process's share of a step among others
        if self.checkpoint is not None:
            found = checkpoint.read_json(self.checkpoint / checkpoint.STATE_NAME).get("chosen")
            if isinstance(found, Mapping):
                return found
        chosen = self.facts.get("chosen")
        return chosen if isinstance(chosen, Mapping) else {}


def open_fresh(folder: Path, config: Config) -> None:
    """Check that a run may begin in a folder.

    Raises:
        ConfigError: It is a file, or holds something.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(fault(config.source, "training_config.output_dir", str(folder), "a folder, not a file"))
    if folder.is_dir() and not all(_is_leftover(each.name) for each in folder.iterdir()):
        what = "another run" if (folder / "config.yaml").exists() else "other files"
        expected = f"a new or empty folder; this one holds {what}"
        todo = "Go on with --resume, or give another training_config.output_dir"
        raise ConfigError(fault(config.source, "training_config.output_dir", str(folder), expected, todo))


def _is_leftover(name: str) -> bool:
    """Whether a file may stand in an empty run folder: of a run that was killed before it wrote anything."""
    return name == checkpoint.LOCK_NAME or name.startswith(checkpoint.TEMPORARY_PREFIX)


def open_to_go_on(folder: Path, config: Config, *, force: bool, held: contextlib.ExitStack) -> Continued:
    """Lock a run folder and find where its run goes on.

    Args:
        folder: The run folder.
        config: The configuration that it is to go on with.
        force: Go on although the configuration differs.
        held: Gets the lock.

    Raises:
        ConfigError: There is no run, another process holds it, or it was started with another configuration: one line
            for each difference.
    """
    if not (folder / "config.yaml").is_file():
        expected = "a folder with a run to go on with"
        raise ConfigError(
            fault(config.source, "training_config.output_dir", str(folder), expected, "Start it without --resume")
        )
    held.enter_context(checkpoint.run_lock(folder))
    checkpoint.remove_leftovers(folder)
    checkpoint.remove_leftovers(folder / "checkpoints")
    facts = checkpoint.read_json(folder / FACTS_NAME)
    then = load_config(folder / "config.yaml")
    config = _with_recorded_rate(config, then, facts)
    differences = _differences(without_secrets(then.to_dict()), without_secrets(config.to_dict()))
    _refuse(config.source, differences, force)
    found = checkpoint.newest_whole(folder / "checkpoints")
    for path, why in found.passed_over:
        logger.warning("%s is passed over: %s", path, why)
    if found.folder is None:
        logger.warning("%s has no whole checkpoint; the run begins again.", folder)
    return Continued(found.folder, facts, force, bool(differences), config)


def _with_recorded_rate(config: Config, then: Config, facts: Mapping[str, Any]) -> Config:
    """Return the configuration with the run's learning rate, where philora chose it then and is to choose it now."""
    name, key = "learning_rate", "training_config.learning_rate"
    recorded, rule = then.training_config.get(name), facts.get("automatic", {}).get(key)
    given = config.training_config.get(name)
    # Of a run without a record of it the earlier default tells; one that was killed before it wrote any has no facts.
    chosen = rule is not None or ("automatic" not in facts and (not facts or recorded == EARLIER_LEARNING_RATE))
    if not chosen or given not in (("auto", recorded) if rule else ("auto",)):
        return config
    return replace(
        config,
        training_config=config.training_config | {name: recorded},
        origins={**config.origins, key: rule or "auto: as the run was started with"},
    )


def check_facts(continued: Continued, facts: Mapping[str, Any], folder: Path) -> None:
    """Compare what a run goes on with to what it was started with.

    Raises:
        ConfigError: Model, adapter, data or the number of processes are others: one line for each difference.
    """
    if not continued.facts:
        return
    differences: list[tuple[str, Any, Any]] = []
    for section in ("model", "adapter", "data", "processes"):
        differences += _differences(continued.facts.get(section), facts.get(section), section)
    _refuse(str(folder), differences, continued.forced)
    for key, then, now in _differences(continued.facts.get("computes"), facts["computes"], "computes"):
        logger.warning("%s was %s and is %s: the run goes on, but not bit for bit.", key, then, now)


def _refuse(where: str, differences: list[tuple[str, Any, Any]], force: bool) -> None:
    if differences and not force:
        todo = "--resume=force goes on anyway"
        raise ConfigError(
            one_per_line(
                [
                    fault(where, key, now, f"what the run was started with: {then!r}", todo)
                    for key, then, now in differences
                ]
            )
        )
    for key, then, now in differences:
        logger.warning("%s is %r where the run was started with %r; it goes on as forced.", key, now, then)


def _differences(then: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        found = []
        for key in {**then, **now}:
            found += _differences(then.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if then == now else [(path, then, now)]


# ------------------------------------------------------------------------------------------------- facts


def facts_of(config: Config, model_config: PretrainedConfig, data: PreparedData) -> dict[str, Any]:
    """What a run is started with, in a form that is compared when it goes on.

    Cost:
        Reads the first mebibyte and 64 further blocks of each file of the model, whatever its size.
    """
    report = data.report.to_dict()
    return {
        "format": 1,
        "model": _files(models.local_path(config.model.name_or_path), getattr(model_config, "_commit_hash", None)),
        "adapter": None if config.model.adapter is None else _files(config.model.adapter, None),
        "data": {
            "fingerprint": data.fingerprint,
            "rows": {name: report[name]["rows"] for name in ("train", "eval") if report.get(name)},
            "tokens": {name: report[name]["tokens"] for name in ("train", "eval") if report.get(name)},
        },
        "automatic": {key: origin for key, origin in config.origins.items() if origin.startswith("auto: ")},
        "processes": processes.count(),
        "computes": _computes(),
    }


def _computes() -> dict[str, Any]:
    return {"torch": torch.__version__, "between the products": native.describe()}


def _files(place: str, commit: str | None) -> dict[str, Any]:
    """Digests of a model's or adapter's files by name; of something on the hub its commit."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return {"id": place, "commit": commit}
    kinds = (".safetensors", ".bin", ".json", ".model", ".jinja")
    return {each.name: _sampled(each) for each in sorted(folder.iterdir()) if each.suffix in kinds and each.is_file()}


def _sampled(path: Path) -> str:
    """SHA-256 of a file's size, its first mebibyte and 64 blocks spread evenly over the rest."""
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
    """Compute with this many threads inside; a sum in another order rounds differently."""
    before = torch.get_num_threads()
    if number is not None and number != before:
        logger.info("%d threads, as the run was started with", number)
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_facts(folder: Path, facts: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Write `run.json`."""
    checkpoint.write_json(folder / FACTS_NAME, {**facts, "chosen": dict(chosen)})


__all__ = ["Continued", "check_facts", "facts_of", "open_fresh", "open_to_go_on", "threads", "write_facts"]
