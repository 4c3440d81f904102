"""Read a trained run for the commands that use one: its own files, and the current paths of its base and data.

Training and resuming check the complete configuration. Commands that use a trained run (chat, serve, generate,
evaluate, merge, export, push) read only the parts that they need, so they work despite a deleted data file or a key of
another release. `run.json` records the run's paths, absolute and relative to the run folder. So a run folder that was
moved together with its base still finds it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from philora.configuration.config import load_config
from philora.configuration.reader import read_yaml
from philora.configuration.run_paths import BUNDLED, RECORD_NAME, Place, current_place
from philora.configuration.schema import Misfit
from philora.configuration.sections import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SourceConfig,
    TokenizerConfig,
)
from philora.errors import ConfigError, fault, one_per_line, shorten
from philora.files.checkpoint import newest_complete, read_json

logger = logging.getLogger("philora.run")

CONFIG_NAME: Final = "config.yaml"
HELD_OUT_NAME: Final = "held_out.jsonl"
_WRITTEN_BY_A_RUN: Final = (RECORD_NAME, "trainer_state.json", "train_results.json", "results.json")
USUAL_SHARE: Final = 0.9
"""If this share of the training conversations has the same system turn, later questions begin with it."""


class SystemTurn(NamedTuple):
    """The most common system turn of a run's training conversations.

    Attributes:
        text: The system prompt.
        share: Share of the conversations that begin with it, above 0 and at most 1.
    """

    text: str
    share: float

    def __str__(self) -> str:
        return (
            f"the system prompt of {100 * self.share:.0f}% of the training conversations is used: {shorten(self.text)}"
        )


def is_run(folder: Path) -> bool:
    """Return whether a folder holds a run: a configuration beside a file that only a run writes."""
    return (folder / CONFIG_NAME).is_file() and any((folder / name).is_file() for name in _WRITTEN_BY_A_RUN)


def run_of(adapter: Path) -> Path | None:
    """Return the run folder that contains an `adapter/` or a checkpoint, or None."""
    adapter = adapter.absolute()
    owner = adapter.parent if adapter.name == "adapter" else None
    if adapter.parent.name == "checkpoints" and adapter.name.startswith("checkpoint-"):
        owner = adapter.parent.parent
    return owner if owner is not None and is_run(owner) else None


def example_messages(system: SystemTurn | None) -> str:
    """Return the messages of a page's example as code: the system turn, if there is one, and a question."""
    messages = [{"role": "user", "content": "Hello"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system.text})
    return json.dumps(messages, ensure_ascii=False)


def resume_command(folder: Path) -> str:
    """Return the command that resumes a run."""
    return f"philora train {folder} --resume"


def recorded_eval_rows(record: Mapping[str, Any]) -> int | None:
    """Return the number of rows that a run held out, from its `run.json`, or None."""
    data = record.get("data")
    rows = data.get("rows") if isinstance(data, Mapping) else None
    found = rows.get("eval") if isinstance(rows, Mapping) else None
    return found if isinstance(found, int) else None


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """The parts of a run folder that commands need, read when they are used.

    Attributes:
        folder: The run folder.
    """

    folder: Path

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_yaml(self.folder / CONFIG_NAME)

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """Return the content of `run.json`; empty if there is no such file."""
        return read_json(self.folder / RECORD_NAME)

    @property
    def adapter(self) -> Path:
        """Return the folder of the trained adapter, which exists once the run has ended."""
        return self.folder / "adapter"

    @property
    def has_ended(self) -> bool:
        """Return whether the run wrote its adapter."""
        return (self.adapter / "adapter_config.json").is_file()

    def newest_checkpoint(self) -> Path | None:
        """Return the newest complete checkpoint that holds an adapter, if there is one."""
        found = newest_complete(self.folder / "checkpoints").folder
        return found if found is not None and (found / "adapter_config.json").is_file() else None

    # -- the configuration, one part at a time

    @cached_property
    def model(self) -> ModelConfig:
        """Return the section `model` of the configuration.

        Raises:
            ConfigError: The section has an invalid value.
        """
        # `base_products` depends on the device that trained; this one may be another.
        return ModelConfig(**(self._section("model", ModelConfig) | {"base_products": None}))

    @cached_property
    def tokenizer(self) -> TokenizerConfig:
        """Return the section `tokenizer` of the configuration, with the errors of `model`."""
        return TokenizerConfig(**self._section("tokenizer", TokenizerConfig))

    @cached_property
    def evaluation(self) -> EvaluationConfig:
        """Return the section `evaluation` of the configuration, with the errors of `model`."""
        return EvaluationConfig(**self._section("evaluation", EvaluationConfig))

    @property
    def system(self) -> SystemTurn | None:
        """Return the recorded system turn that nearly all training conversations began with, or None."""
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
        """Return the seed with which the held-out rows were drawn.

        Raises:
            ConfigError: It is not a whole number.
        """
        return int(self._training_number("seed", 42) or 0)

    @property
    def max_length(self) -> int | None:
        """Return the configured length of the longest row in tokens; None for the model's context.

        Raises:
            ConfigError: It is not a whole number.
        """
        return self._training_number("max_length", None)

    def data(self) -> DataConfig:
        """Return the section `data` of the configuration, with current paths.

        Raises:
            ConfigError: A source was deleted, or the section has an invalid value.
        """
        section = dict(self._config.get("data") or {})
        for key in ("train", "eval"):
            if key in section:
                section[key] = self._found(section[key])
        return load_config({"data": section}).data

    def _found(self, given: Any) -> Any:
        """Return a source, or a list of them, with current paths."""
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
        """Return the values of a section; unknown keys are left out with a warning."""
        where, given = str(self.folder / CONFIG_NAME), self._config.get(name) or {}
        if not isinstance(given, Mapping):
            raise ConfigError(fault(where, name, given, "a mapping, as the run wrote it"))
        known = {field.name: field.metadata["rule"] for field in dataclasses.fields(kind)}
        values, faults = {}, []
        for key, value in given.items():
            if key not in known:
                logger.warning("%s: %s.%s is unknown to this release and is ignored", where, name, key)
                continue
            try:
                values[str(key)] = known[key].read(value)
            except Misfit as misfit:
                setting = ".".join((name, str(key)))
                faults.append(fault(where, setting, value, known[key].text, misfit.hint))
        if faults:
            raise ConfigError(one_per_line(faults))
        return values

    # -- current paths

    def base(self) -> Place:
        """Return the current location of the base model, which `model` names."""
        return self.place(self.model.name_or_path)

    def place(self, name: str) -> Place:
        """Return the current location of a configured path: as recorded, else relative to the start folder."""
        section = self._config.get("training_config")
        written = section.get("output_dir") if isinstance(section, Mapping) else None
        return current_place(self.folder, self.record, written, name)


# -- writing the record


def paths_of(config: Config, folder: Path) -> dict[str, dict[str, str]]:
    """Return the paths of a configuration for `run.json`: the given path, with its absolute and relative form.

    Names that are not paths of this machine are left out.
    """
    sides: tuple[Any, ...] = (config.data.train, config.data.eval)
    sources = (source for side in sides if isinstance(side, tuple) for source in side)
    paths = (source.path for source in sources if isinstance(source, SourceConfig))
    given = [config.model.name_or_path, config.model.adapter, *paths]
    found = {}
    for name in given:
        if name is None or name in BUNDLED or not Path(name).expanduser().exists():
            continue
        absolute = os.path.normpath(Path(name).expanduser().absolute())
        found[name] = {"absolute": absolute}
        try:
            found[name]["relative"] = os.path.relpath(absolute, folder.absolute())
        except ValueError:  # another drive of Windows
            continue
    return found
