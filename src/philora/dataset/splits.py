"""Find the files of a split in a folder by their names, as `datasets` and the Hub do."""

from __future__ import annotations

import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from philora.errors import DataError, fault, nearest

DEFAULT_SPLITS = {
    "train": ("train", "train_sft"),
    "eval": ("validation", "test", "test_sft", "eval", "dev", "valid", "val"),
}
"""The splits that are read for training and for evaluation where none is named, the first of them that exists."""


def choose_split(where: str, given: str | None, role: Literal["train", "eval"], names: Sequence[str]) -> str:
    """Return the split that is asked for by name, or the default of training or evaluation.

    Args:
        where: What has the splits, for the message.
        given: `split` of the configuration.
        role: What the records are for.
        names: The splits there are.

    Raises:
        DataError: None of them has that name, or there are several and none is meant by default.
    """
    for name in (given,) if given else DEFAULT_SPLITS[role]:
        if name in names:
            return name
    if given is None and len(names) == 1:
        return names[0]
    hint = (given and nearest(given, names)) or "Name one of them"
    raise DataError(fault(where, "split", given, f"one of {', '.join(names)}", hint))


def folder_splits(folder: Path, subset: str | None, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Return the files of every split of a folder, found by `datasets` as on the Hub.

    The `configs` of a README.md decide where they are written, else the names of files and folders (`train`,
    `validation`, `test` and their other spellings); without any such name all files are `train`.

    Args:
        folder: Where the files lie.
        subset: Name of one of the `configs`.
        files: Those that philora has a reader for; others are left out.

    Raises:
        DataError: There is no such subset, or several and none is named.
    """
    from datasets.data_files import get_data_patterns, resolve_pattern, sanitize_patterns

    chosen = _subset(folder, subset, _configs(folder))
    base = glob.escape(str(folder.resolve()))
    by_path = {file.resolve(): file for file in files}
    if "data_dir" in chosen and "data_files" not in chosen:
        base = f"{base}/{glob.escape(str(chosen['data_dir']))}"
    patterns = sanitize_patterns(chosen["data_files"]) if "data_files" in chosen else get_data_patterns(base)
    splits: dict[str, list[Path]] = {}
    for split, several in patterns.items():
        found: set[Path] = set()
        for pattern in several:
            try:
                found |= {Path(item).resolve() for item in resolve_pattern(pattern, base)}
            except FileNotFoundError:
                continue
        read = [file for path, file in by_path.items() if path in found]
        if read:
            splits[str(split)] = read
    return splits or {"train": list(files)}


def _configs(folder: Path) -> dict[str, Any]:
    """Return the `configs` of a dataset card, by name."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # a README.md without a card is none the worse
    try:
        return dict(MetadataConfigs.from_dataset_card_data(DatasetCard.load(card).data))
    except (ValueError, OSError) as error:
        raise DataError(fault(str(card), "configs", str(error), "a dataset card that can be read")) from error
    finally:
        logger.setLevel(level)


def _subset(folder: Path, subset: str | None, described: dict[str, Any]) -> dict[str, Any]:
    """Return the description of the chosen subset; empty if there is no description."""
    if not described:
        if subset is None:
            return {}
        expected = "null, since the folder has no README.md that describes subsets"
        raise DataError(fault(str(folder), "subset", subset, expected, "Give the folder of the subset as path"))
    names = list(described)
    if subset is None and len(names) == 1:
        return dict(described[names[0]])
    default = [name for name, item in described.items() if name == "default" or item.get("default")]
    name = subset or (default[0] if default else None)
    if name not in described:
        hint = nearest(str(subset), names) if subset else "Name one of them with subset"
        raise DataError(fault(str(folder), "subset", subset, f"one of {', '.join(names)}", hint))
    return dict(described[name])
