"""Merge an adapter that was trained over a quantised base into the 16-bit base, and measure the loss over both.

An adapter is trained to fit rounded weights, so the 16-bit base may suit it less well, or better. The held-out loss
shows which.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import AutoModelForCausalLM

from philora.adapters.peft_models import load_adapter
from philora.evaluation.assessment import held_out_of, rows_to_score
from philora.evaluation.scores import TokenScores, score
from philora.exporting.merged_folder import MergeResult, free_folder, merge_to_folder
from philora.generation.inference import Loaded, load
from philora.models.base_files import base_folder, load_trained_over, read_trained_over

logger = logging.getLogger(__name__)


class BaseScores(NamedTuple):
    """Scores of one adapter over both bases, on the same rows.

    Attributes:
        trained_over: Over the dequantised base that it was trained over.
        fresh: Over the base's 16-bit weights, as in the merged folder.
        rows: The number of rows.
    """

    trained_over: TokenScores
    fresh: TokenScores
    rows: int


def merge_into_fresh_base(
    source: str | Path, out: str | Path, *, base: str | None = None, data: str | Path | None = None, **options: Any
) -> tuple[MergeResult, BaseScores | None]:
    """Merge as `merge_to_folder(fresh_base=True)`, and compare the loss over both bases.

    Args:
        source, out, base: As for `merge_to_folder`.
        data: Rows to score; default: those that the run held out. Rows of the training set are left out.
        **options: Further arguments of `merge_to_folder`.

    Returns:
        The merge, and the scores; None, with a notice, if there are no rows or the base was not quantised.

    Numerics:
        Both are scored in the dtype of the run's computation. The fresh base's weights are those of the merged folder,
        rounded to the dtype of its files.

    Cost:
        In addition to the merge: a forward pass over the rows with each model, one after the other.

    Raises:
        As `merge_to_folder`, and DataError: The rows cannot be used. Nothing is written then.
    """
    out = free_folder(out)
    loaded = load(source, base=base)
    pad_token_id = cast(int, loaded.tokenizer.pad_token_id)
    rows = _rows(loaded, data)
    model = None if rows is None else _as_trained(loaded)
    before = None if model is None else score(model, rows, pad_token_id=pad_token_id)
    dtype = getattr(model, "dtype", None)
    del loaded, model
    gc.collect()  # PEFT's models are cycles
    result = merge_to_folder(source, out, base=base, fresh_base=True, **options)
    if rows is None or before is None:
        return result, None
    merged = AutoModelForCausalLM.from_pretrained(result.folder, dtype=dtype)
    return result, BaseScores(before, score(merged, rows, pad_token_id=pad_token_id), len(rows))


def _rows(loaded: Loaded, data: str | Path | None) -> Any:
    """Return tokenised rows that were not trained on; None if there are none."""
    if data is None and (loaded.run is None or not loaded.run.holds_out):
        logger.warning("the loss over both bases needs rows that were not trained on: give them by --data FILE")
        return None
    found = held_out_of(loaded, data)
    return found.rows.select(rows_to_score(found, None, keep_training_rows=False))


def _as_trained(loaded: Loaded) -> Any:
    """Return the adapter on its base as in training; None if the base was not quantised.

    Without the run's configuration the record beside the adapter describes the quantisation.
    """
    named = loaded.source.base or loaded.base
    folder = base_folder(named, loaded.source.revision)
    trained_over = read_trained_over(folder, named, loaded.source.path, fresh_base=False)
    if trained_over is None:
        logger.warning("the adapter was not trained over a quantised base: there is only one base")
        return None
    if getattr(loaded.model.get_base_model(), "hf_quantizer", None) is not None:
        return loaded.model
    return load_adapter(load_trained_over(folder, trained_over), loaded.source.path)
