"""A trained run, as the commands that use one read it: its own files, and where its base and its data are now.

Training and resuming check the whole configuration. What uses a trained run afterwards (chat, serve, generate,
evaluate, merge, export, push) reads only the parts that it needs: a setting of the training, a data file that was
deleted or a key of another release does not stop it. The record `run.json` says where the run's paths led when it was
trained, as absolute paths and from the run folder, so that a folder which moved together with its base still finds it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from philora.configuration.config import load_config
from philora.configuration.reader import read_yaml
from philora.configuration.schema import Misfit
from philora.configuration.sections import (
    HELPDESK,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SourceConfig,
    TokenizerConfig,
)
from philora.errors import ConfigError, fault, one_per_line, shorten
from philora.files.checkpoint import newest_whole, read_json

logger = logging.getLogger("philora.run")

CONFIG_NAME: Final = "config.yaml"
RECORD_NAME: Final = "run.json"
HELD_OUT_NAME: Final = "held_out.jsonl"
_WRITTEN_BY_A_RUN: Final = (RECORD_NAME, "trainer_state.json", "train_results.json", "results.json")
_BUNDLED: Final = ("nano", HELPDESK)


USUAL_SHARE: Final = 0.9
"""Share of the training conversations from which on their commonest system turn begins what is asked later."""


class SystemTurn(NamedTuple):
    """The commonest system turn of a run's training conversations.

    Attributes:
        text: What it says.
        share: Of the conversations that begin with it, above 0 and at most 1.
    """

    text: str
    share: float

    def __str__(self) -> str:
        return (
            f"the system prompt of {100 * self.share:.0f}% of the training conversations is used: {shorten(self.text)}"
        )


class Place(NamedTuple):
    """Describe where a path of a run leads now.

    Attributes:
        name: The path, or the name itself where it is none (a hub id, `nano`) or nothing was found.
        tried: The places that were looked at in vain; empty when the name can be used.
    """

    name: str
    tried: tuple[str, ...] = ()


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run: a configuration beside a file that only a run writes."""
    return (folder / CONFIG_NAME).is_file() and any((folder / name).is_file() for name in _WRITTEN_BY_A_RUN)


def run_of(adapter: Path) -> Path | None:
    """Return the run folder that an `adapter/` or a checkpoint stands in; None for an adapter of no run."""
    adapter = adapter.absolute()
    owner = adapter.parent if adapter.name == "adapter" else None
    if adapter.parent.name == "checkpoints" and adapter.name.startswith("checkpoint-"):
        owner = adapter.parent.parent
    return owner if owner is not None and is_run(owner) else None


def example_messages(system: SystemTurn | None) -> str:
    """Return the messages of a page's example as code: a question, after the system turn where there is one."""
    messages = [{"role": "user", "content": "Hello"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system.text})
    return json.dumps(messages, ensure_ascii=False)


def resume_command(folder: Path) -> str:
    """Return the command that resumes a run."""
    return f"philora train {folder} --resume"


def recorded_eval_rows(record: Mapping[str, Any]) -> int | None:
    """Return how many rows a run held out, as its `run.json` says; None where it does not."""
    data = record.get("data")
    rows = data.get("rows") if isinstance(data, Mapping) else None
    found = rows.get("eval") if isinstance(rows, Mapping) else None
    return found if isinstance(found, int) else None


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """The parts of a run folder that its users need, each read when it is asked for.

    Attributes:
        folder: The run folder.
    """

    folder: Path

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_yaml(self.folder / CONFIG_NAME)

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """Return what `run.json` holds; empty where there is none."""
        return read_json(self.folder / RECORD_NAME)

    @property
    def adapter(self) -> Path:
        """The trained adapter; it is there when the run has ended."""
        return self.folder / "adapter"

    @property
    def has_ended(self) -> bool:
        """Return whether the run wrote its adapter."""
        return (self.adapter / "adapter_config.json").is_file()

    def newest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint that holds an adapter, if there is one."""
        found = newest_whole(self.folder / "checkpoints").folder
        return found if found is not None and (found / "adapter_config.json").is_file() else None

    # -- the configuration, one part at a time

    @cached_property
    def model(self) -> ModelConfig:
        """Return how the base was loaded, by the name that the configuration gives it.

        Raises:
            ConfigError: The section has a value that it cannot have.
        """
        # How the frozen products were computed is of the device that trained; here it may be another.
        return ModelConfig(**(self._section("model", ModelConfig) | {"base_products": None}))

    @cached_property
    def tokenizer(self) -> TokenizerConfig:
        """Return what the run changed in the tokenizer.

        Raises:
            ConfigError: As `model`.
        """
        return TokenizerConfig(**self._section("tokenizer", TokenizerConfig))

    @cached_property
    def evaluation(self) -> EvaluationConfig:
        """Return how the run was evaluated.

        Raises:
            ConfigError: As `model`.
        """
        return EvaluationConfig(**self._section("evaluation", EvaluationConfig))

    @property
    def system(self) -> SystemTurn | None:
        """The system turn that nearly all training conversations began with, by the run's record; None without one."""
        given = self.record.get("system")
        text, share = (given.get("text"), given.get("share")) if isinstance(given, Mapping) else (None, None)
        if not isinstance(text, str) or not isinstance(share, float | int) or share < USUAL_SHARE:
            return None
        return SystemTurn(text, float(share))

    @property
    def holds_out(self) -> bool:
        """Return whether the configuration names rows to hold out."""
        section = self._config.get("data")
        return isinstance(section, Mapping) and section.get("eval", DataConfig.eval) is not None

    @property
    def seed(self) -> int:
        """The seed, by which the held-out rows were drawn.

        Raises:
            ConfigError: It is no whole number.
        """
        return int(self._training_number("seed", 42) or 0)

    @property
    def max_length(self) -> int | None:
        """The longest row in tokens, as configured; None: the model's context.

        Raises:
            ConfigError: It is no whole number.
        """
        return self._training_number("max_length", None)

    def data(self) -> DataConfig:
        """Return the data that the run was trained on, where it is now.

        Raises:
            ConfigError: A source was deleted, or the section has a value that it cannot have.
        """
        section = dict(self._config.get("data") or {})
        for key in ("train", "eval"):
            if key in section:
                section[key] = self._found(section[key])
        return load_config({"data": section}).data

    def _found(self, given: Any) -> Any:
        """A source, or several, with their paths as they are now."""
        if isinstance(given, list):
            return [self._found(source) for source in given]
        if isinstance(given, Mapping) and isinstance(given.get("path"), str):
            return {**given, "path": self.place(given["path"]).name}
        return self.place(given).name if isinstance(given, str) else given

    def _training_number(self, name: str, default: int | None) -> int | None:
        section = self._config.get("training_config")
        value = section.get(name, default) if isinstance(section, Mapping) else default
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        where = str(self.folder / CONFIG_NAME)
        raise ConfigError(fault(where, f"training_config.{name}", value, "a whole number, as the run wrote it"))

    def _section(self, name: str, kind: type) -> dict[str, Any]:
        """The values of a section; keys that this release does not know are named once and left out."""
        where, given = str(self.folder / CONFIG_NAME), self._config.get(name) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(fault(where, name, given, "a mapping, as the run wrote it"))
        known = {field.name: field.metadata["rule"] for field in dataclasses.fields(kind)}
        values, faults = {}, []
        for key, value in given.items():
            if key not in known:
                logger.warning("%s: %s.%s is not known to this release and is not used", where, name, key)
                continue
            try:
                values[str(key)] = known[key].read(value)
            except Misfit as misfit:
                setting = ".".join((name, str(key)))
                faults.append(fault(where, setting, value, known[key].text, misfit.hint))
        if faults:
            raise ConfigError(one_per_line(faults))
        return values

    # -- where things are now

    def base(self) -> Place:
        """Return where the base model is now.

        Raises:
            ConfigError: As `model`.
        """
        return self.place(self.model.name_or_path)

    def place(self, name: str) -> Place:
        """Return where a path of the configuration leads now: as recorded, else seen from where the run was started."""
        if name in _BUNDLED:
            return Place(name)
        recorded = self._recorded(name)
        given = Path(name).expanduser()
        candidates = [Path(recorded["absolute"])] if "absolute" in recorded else []
        if "relative" in recorded:
            candidates.append(Path(os.path.normpath(self.folder.absolute() / recorded["relative"])))
        if not recorded:
            candidates.append(given.absolute())
            started_in = self._started_in()
            if started_in is not None and not given.is_absolute():
                candidates.append(started_in / given)
        places = list(dict.fromkeys(str(candidate) for candidate in candidates))
        for place in places:
            if Path(place).exists():
                return Place(place)
        return Place(name, tuple(places)) if recorded or is_path(name) else Place(name)

    def _recorded(self, name: str) -> Mapping[str, str]:
        paths = self.record.get("paths")
        found = paths.get(name) if isinstance(paths, Mapping) else None
        if not isinstance(found, Mapping):
            return {}
        return {key: value for key, value in found.items() if isinstance(value, str)}

    def _started_in(self) -> Path | None:
        """The folder that the run was started in, told from its own place; for runs that recorded no paths."""
        section = self._config.get("training_config")
        written = section.get("output_dir") if isinstance(section, Mapping) else None
        if not isinstance(written, str) or Path(written).expanduser().is_absolute():
            return None
        parts, own = Path(os.path.normpath(written)).parts, self.folder.absolute().parts
        if ".." in parts or own[-len(parts) :] != parts:
            return None
        return Path(*own[: -len(parts)])


def is_path(name: str) -> bool:
    """Return whether a name can only be a path of this machine, not a hub id."""
    return name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") > 1


# -- writing the record


def paths_of(config: Config, folder: Path) -> dict[str, dict[str, str]]:
    """Return the paths of a configuration for the record: for each, as it was given, where it leads.

    Args:
        config: The configuration; names that are no paths of this machine are left out.
        folder: The run folder.
    """
    given = [config.model.name_or_path, config.model.adapter, *_sources(config.data)]
    found = {}
    for name in given:
        if name is None or name in _BUNDLED or not Path(name).expanduser().exists():
            continue
        absolute = os.path.normpath(Path(name).expanduser().absolute())
        found[name] = {"absolute": absolute}
        try:
            found[name]["relative"] = os.path.relpath(absolute, folder.absolute())
        except ValueError:  # another drive of Windows
            continue
    return found


def _sources(data: DataConfig) -> Iterable[str]:
    sides: tuple[Any, ...] = (data.train, data.eval)
    return [
        source.path for side in sides if isinstance(side, tuple) for source in side if isinstance(source, SourceConfig)
    ]


__all__ = [
    "HELD_OUT_NAME",
    "RECORD_NAME",
    "Place",
    "SystemTurn",
    "TrainedRun",
    "example_messages",
    "is_path",
    "is_run",
    "paths_of",
    "resume_command",
    "run_of",
]
