"""An adapter that was trained over a quantised base, merged into a fresh 16-bit one, with the loss of both beside it.

An adapter learns what goes well with rounded weights, so a fresh base may suit it less, or better. The held-out loss
says which.
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
    """One adapter on both bases, on the same rows.

    Attributes:
        trained_over: On the dequantised base, over which it was trained.
        fresh: On the base's 16-bit weights, as the merged folder has them.
        rows: How many rows.
    """

    trained_over: TokenScores
    fresh: TokenScores
    rows: int


def merge_into_fresh_base(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    data: str | Path | None = None,
    **options: Any,
) -> tuple[MergeResult, BaseScores | None]:
    """Merge as `merge_to_folder(fresh_base=True)`, and compare the loss of both bases.

    Args:
        source: As for `merge_to_folder`.
        out: As for `merge_to_folder`.
        base: As for `merge_to_folder`.
        data: Rows to score; default: those that the run held out. Rows of the training set are left out.
        **options: Further arguments of `merge_to_folder`.

    Returns:
        The merge, and the scores; None, with a notice, where there are no rows or nothing was quantised.

    Numerics:
        Both are scored in the dtype that the run computed in; the fresh one's weights are those of the merged folder,
        rounded to the dtype of its files.

    Cost:
        Beyond the merge's: one forward pass over the rows with every model, one after the other.

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
    """Return tokenised rows that were not trained on; None where there are none."""
    if data is None and (loaded.run is None or not loaded.run.holds_out):
        logger.warning("the loss of both bases needs rows that were not trained on: --data FILE gives them")
        return None
    found = held_out_of(loaded, data)
    return found.rows.select(rows_to_score(found, None, keep_training_rows=False))


def _as_trained(loaded: Loaded) -> Any:
    """Return the adapter on the base as it was in training; None where that was not quantised.

    Without the run's configuration the record beside the adapter says how it was.
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
