"""Read datasets by the `datasets` library: saved to disk, or from the Hub."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from philora.configuration.sections import HELPDESK
from philora.dataset.records import BATCH_ROWS, Record, Role, Source, in_batches
from philora.dataset.splits import choose_split
from philora.errors import DataError, fault
from philora.files.links import refuse_leading_out

if TYPE_CHECKING:
    from datasets import Features

    from philora.configuration.sections import SourceConfig


def refuse_subset(config: SourceConfig, why: str) -> None:
    """Refuse `subset` where a source has none."""
    if config.subset is not None:
        raise DataError(fault(config.path, "subset", config.subset, f"null: {why}", "Leave subset out"))


def saved_source(config: SourceConfig, path: Path, role: Role) -> Source:
    """Return a dataset or one split of it that `save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    _require_files_inside(path)
    with quiet_datasets():
        loaded = load_from_disk(str(path))
    if isinstance(loaded, DatasetDict):
        names = list(loaded)
        split = choose_split(str(path), config.split, role, names)
        others = {f"split {name} ({len(loaded[name]):,} records)": None for name in names if name != split}
        return _dataset_source(config, loaded[split], config.path, others)
    if config.split is not None:
        expected = "null, since this saved dataset is one split"
        raise DataError(fault(str(path), "split", config.split, expected, "Leave split out"))
    return _dataset_source(config, loaded, config.path, {})


def _require_files_inside(path: Path) -> None:
    """Check that a saved dataset names no file outside its folder.

    Raises:
        DataError: `state.json` names another folder's file, or a file is a link to one.
    """
    for state in [*path.glob("state.json"), *path.glob("*/state.json")]:
        try:
            files = json.loads(state.read_text(encoding="utf-8")).get("_data_files", [])
            named = [state.parent / str(file["filename"]) for file in files]
        except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
            expected = "JSON as datasets' save_to_disk writes it"
            raise DataError(fault(str(state), "content", type(error).__name__, expected)) from error
        refuse_leading_out(path, DataError, [state, *named])


def hub_source(config: SourceConfig, role: Role) -> Source:
    """Return a dataset of the Hub, downloaded or streamed."""
    import datasets

    from philora.runtime.hub import datasets_from_cache

    arguments = (config.path, config.subset) if config.subset else (config.path,)
    with quiet_datasets(), datasets_from_cache():
        try:
            split = config.split
            others: dict[str, None] = {}
            if split is None:
                names = datasets.get_dataset_split_names(*arguments)
                split = choose_split(config.path, None, role, names)
                others = {f"split {name}": None for name in names if name != split}
            loaded = datasets.load_dataset(*arguments, split=split, streaming=config.streaming)
        except DataError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(_hub_message(config, error)) from error
    return _dataset_source(config, loaded, f"{config.path}[{split}]", others)


def _hub_message(config: SourceConfig, error: Exception) -> str:
    close = difflib.get_close_matches(config.path, [HELPDESK, *(entry.name for entry in Path().iterdir())], n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    expected = "a file or folder that exists, or a dataset of the Hugging Face hub"
    if isinstance(error, ConnectionError):
        expected += "; no such file is here and the hub cannot be reached"
        todo = "Check the spelling of the path, connect to the network, or download the dataset on another machine"
        return fault("data", "path", config.path, expected, f"{hint}{todo} and give its folder")
    expected += f" ({str(error).splitlines()[0]})"
    return fault("data", "path", config.path, expected, f"{hint}Check path, subset and split")


def _dataset_source(config: SourceConfig, dataset: Any, name: str, unread: dict[str, None]) -> Source:
    def rows() -> Iterator[tuple[int, Record]]:
        number = 0
        for columns in dataset.iter(batch_size=BATCH_ROWS):
            names = list(columns)
            for cells in zip(*columns.values(), strict=True):
                number += 1
                yield number, dict(zip(names, cells, strict=True))

    fingerprint = hashlib.sha256(f"{name}:{getattr(dataset, '_fingerprint', '')}".encode()).hexdigest()
    size = None if config.streaming else getattr(dataset, "size_in_bytes", None)
    return Source(name, fingerprint, lambda: in_batches(name, "row", rows()), config.limit, size, unread)


def token_features() -> Features:
    """Return the columns of tokenised rows."""
    from datasets import Features, List, Value

    return Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars and no chatter of `datasets` inside; what was set before is set again afterwards."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    level = datasets.utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
