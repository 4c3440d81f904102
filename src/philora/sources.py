"""Where an adapter is, and which base model it belongs to: the argument RUN_OR_ADAPTER of every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from philora.errors import AdapterError, fault, nearest
from philora.families import find
from philora.hub import reach
from philora.models import local_path


class AdapterSource(NamedTuple):
    """An adapter and its base.

    Attributes:
        path: Folder in PEFT's format, or a file in loralib's.
        base: Folder or hub id of the base model; None: nothing says which.
        run: The run folder that the adapter belongs to, if it was given by that.
    """

    path: Path
    base: str | None
    run: Path | None = None


def find_adapter(source: str | Path, base: str | None = None) -> AdapterSource:
    """Resolve a run folder, an adapter folder, a checkpoint, a loralib file or a hub id.

    Args:
        source: What the person gave.
        base: Base model that they named; default: the one that the adapter names.

    Raises:
        AdapterError: There is no adapter.
    """
    path, run = Path(source).expanduser(), None
    if path.is_dir() and not (path / "adapter_config.json").is_file():
        if not (path / "adapter").is_dir():
            checkpoints = sorted(each.parent for each in path.glob("**/adapter_config.json"))
            todo = f"Did you mean {checkpoints[-1]}?" if checkpoints else "Train one: philora train CONFIG"
            expected = "a run folder, or a folder with adapter_config.json"
            raise AdapterError(fault("adapter", "source", str(source), expected, todo))
        path, run = path / "adapter", path
    elif not path.exists():
        path = _download(str(source))
    if base is None and path.is_dir():
        base = _named_base(path)
    return AdapterSource(path, None if base is None else local_path(base), run)


def _named_base(folder: Path) -> str | None:
    try:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        expected = "JSON as PEFT writes it"
        raise AdapterError(fault(str(folder / "adapter_config.json"), "content", str(error), expected)) from error
    return str(named) if named else None


def _download(name: str) -> Path:
    expected = "a run folder, an adapter folder, a loralib file, or an adapter on the Hugging Face Hub"
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        here = [each.name for each in Path(name).expanduser().parent.glob("*")]
        raise AdapterError(fault("adapter", "source", name, expected, nearest(Path(name).name, here)))
    try:
        wanted = ["*.json", "adapter_model.safetensors", "tokenizer*"]
        return Path(snapshot_download(name, allow_patterns=wanted, **reach()))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        todo = f"Check the path, or your login. The hub says: {' '.join(str(error).split())[:200]}"
        raise AdapterError(fault("adapter", "source", name, expected, todo)) from error


def licence(base: str | None) -> str | None:
    """The licence of a base: what the card in its folder says; Microsoft's Phi models are all under MIT."""
    if base is None:
        return None
    readme = Path(local_path(base)) / "README.md"
    if readme.is_file():
        found = getattr(
            ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data, "license", None
        )
        return str(found) if found else None
    return "mit" if find(base) is not None else None
