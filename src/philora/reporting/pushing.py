"""Push an adapter or a merged model with its card to the Hugging Face Hub, in one commit."""

from __future__ import annotations

import fnmatch
import json
import logging
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from philora.adapters.adapter_files import RECORD_NAME
from philora.configuration.sections import Config
from philora.errors import AdapterError, ConfigError, fault
from philora.exporting.merged_folder import merge_to_folder
from philora.files.checkpoint import read_peft_tensors, write_json, write_text
from philora.models.loading import local_path
from philora.models.locate import AdapterSource, find_adapter, require_base
from philora.models.run_folder import TrainedRun
from philora.models.tokenizer_files import Companions
from philora.reporting.card import model_card
from philora.runtime import hub

logger = logging.getLogger(__name__)

# Files in the root of a repository that transformers or PEFT read by name. transformers loads an adapter onto a model
# in the same folder, so a repository has one or the other.
_ADAPTER_WEIGHTS = ("adapter_config.json", "adapter_model*")
_MODEL_WEIGHTS = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin*", "model*.bin*")
_BESIDE_WEIGHTS = (
    "config.json", RECORD_NAME, "generation_config.json", "stop_tokens.json", "chat_template.*", "tokenizer*",
    "added_tokens.json", "special_tokens_map.json", "vocab.*", "merges.txt",
)  # fmt: skip


class Pushed(NamedTuple):
    """Describe what was pushed, or would be.

    Attributes:
        repo_id: The repository.
        files: Names and sizes in bytes.
        url: URL of the commit; None after a dry run.
        removed: Files of an earlier push that the commit removed, because they would be read with the new ones.
    """

    repo_id: str
    files: dict[str, int]
    url: str | None
    removed: tuple[str, ...] = ()


def push(
    source: str | Path,
    repo_id: str,
    *,
    merged: bool = False,
    replace: bool = False,
    private: bool | None = None,
    dry_run: bool = False,
    base: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Publish an adapter, or the merged model, with tokenizer, generation config, stop tokens and a model card.

    Args:
        source: Run folder, adapter folder or checkpoint. A run's card has its data, settings and results.
        repo_id: `OWNER/NAME`, or `NAME` for the token's owner; created if it does not exist.
        merged: Push the complete model with the adapter in its weights, merged and verified as by `merge_to_folder`.
        replace: Remove the adapter from a repository that gets the merged model, or the model from one that gets the
            adapter; otherwise such a push is refused. Old shards and tokenizer files of the same kind are always
            removed.
        private: Whether a new repository is private; default: the owner's setting.
        dry_run: Make all files and list them, but send nothing; no token is needed.
        base: Base model; default: the one that the adapter names.
        token: The Hub's token; default: that of `HF_TOKEN`, or of the login.

    Raises:
        ConfigError: The name or the token is not usable, or the repository has weights that would be loaded together
            with the new ones; nothing was sent.
        AdapterError: There is no complete adapter in PEFT's format.
        RunError: The Hub cannot be reached or refuses the files. A commit is complete or absent.

    Example:
        >>> push("runs/helpdesk", "me/helpdesk", dry_run=True)  # doctest: +SKIP
    """
    hub.check_repo_id(repo_id, "push")
    found = find_adapter(source, base, unfinished=False)
    if not found.path.is_dir():
        todo = "Convert it first: philora export"
        raise AdapterError(fault("push", "source", str(source), "an adapter in PEFT's format", todo))
    if not dry_run:
        token = hub.require_token("push", token)
        repo_id = hub.create_repository(repo_id, token, private, "push")
        if not replace:
            _require_one_kind(repo_id, token, "push", merged=merged)
    with tempfile.TemporaryDirectory(prefix="philora-push-") as temporary:
        folder = Path(temporary) / "files"
        _write_files(found, folder, repo_id, base=base, merged=merged, example=private is True)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        if dry_run or token is None:
            return Pushed(repo_id, files, None)
        what = "merged model" if merged else "adapter"
        # Old files that would be read with the new ones, such as the shards of a larger model.
        old = [name for name in hub.files(repo_id, token, "push") if name not in files]
        removed = _matching(old, (*_ADAPTER_WEIGHTS, *_MODEL_WEIGHTS, *_BESIDE_WEIGHTS))
        url = hub.upload(folder, repo_id, token, f"Upload the {what} with philora", "push", remove=removed)
    logger.info("pushed to %s", url)
    return Pushed(repo_id, files, url, removed)


def _write_files(
    found: AdapterSource, folder: Path, repo_id: str, *, base: str | None, merged: bool, example: bool
) -> None:
    """Write the files to push: the adapter or the merged model, and its card.

    With `example` the card shows a held-out question; only for a private repository, since it is part of the data.
    """
    name = base or found.base
    name = "nano" if name == local_path("nano") else name
    if merged:
        require_base(found)
        merge_to_folder(found.path, folder, base=base)
    else:
        folder.mkdir()
        _copy_adapter(found, folder, name)
    is_result = found.path.absolute().name == "adapter"
    text = model_card(
        repo_id,
        run=found.run if is_result else None,  # the run's scores are not those of a checkpoint
        base=name,
        adapter_config=json.loads((found.path / "adapter_config.json").read_text(encoding="utf-8")),
        merged=merged,
        tokenizer=(folder / "tokenizer_config.json").is_file(),
        system=None if found.run is None else TrainedRun(found.run).system,
        example=example,
    )
    write_text(folder / "README.md", text)


def _matching(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _require_one_kind(repo_id: str, token: str, where: str, *, merged: bool) -> None:
    """Refuse a repository whose weights would be loaded together with the new ones.

    Raises:
        ConfigError: It has an adapter and gets a model, or vice versa.
    """
    other = _matching(hub.files(repo_id, token, where), _ADAPTER_WEIGHTS if merged else _MODEL_WEIGHTS)
    if other:
        new, old = ("a merged model", "an adapter") if merged else ("an adapter", "a model")
        expected = f"a repository without {old}, since {new} is pushed and both would be loaded together"
        todo = f"Give another repository, or remove {', '.join(other[:3])} from this one with philora push --replace"
        raise ConfigError(fault(where, "repo_id", repo_id, expected, todo))


class Target(NamedTuple):
    """The repository that a run pushes its adapter to at its end."""

    repo_id: str
    private: bool | None
    token: str


def target_of(config: Config) -> Target | None:
    """Return the repository of `training_config.push_to_hub`; create it, so that an error shows before training.

    Raises:
        ConfigError, RunError: As `push`, before anything was trained.
    """
    training = config.training_config
    if not training.get("push_to_hub"):
        return None
    repo_id = str(training.get("hub_model_id") or Path(training["output_dir"]).expanduser().absolute().name)
    hub.check_repo_id(repo_id, config.source, "training_config.hub_model_id")
    token = hub.require_token(config.source, training.get("hub_token"))
    private = training.get("hub_private_repo")
    if config.origins.get("training_config.hub_strategy", "default") != "default" and training["hub_strategy"] != "end":
        logger.warning("training_config.hub_strategy: a run pushes its adapter once, when it is done")
    repo_id = hub.create_repository(repo_id, token, private, config.source)
    _require_one_kind(repo_id, token, config.source, merged=False)
    return Target(repo_id, private, token)


def _copy_adapter(found: AdapterSource, folder: Path, base: str | None) -> None:
    """Copy the adapter's files, and nothing else in its folder, such as the state of an optimizer."""
    read_peft_tensors(found.path)
    shutil.copyfile(found.path / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    config: dict[str, Any] = json.loads((found.path / "adapter_config.json").read_text(encoding="utf-8"))
    if base is not None and Path(base).is_absolute():
        expected = "a model on the hub, because others who download the adapter need it"
        logger.warning("%s", fault("push", "base", Path(base).name, expected, "Name it: --base OWNER/NAME"))
        base = Path(base).name  # folders of this machine are not published
    config["base_model_name_or_path"] = base
    write_json(folder / "adapter_config.json", config)
    if (found.path / RECORD_NAME).is_file():
        shutil.copyfile(found.path / RECORD_NAME, folder / RECORD_NAME)
    Companions(found.path, Path(found.base or ""), None).write(folder)
