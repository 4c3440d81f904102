"""Tokens that a tokenizer has and a model never learned: their rows of the embedding are spare, or are not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from philora.errors import ModelError
from philora.families import tokens_that_ship
from philora.models.base_files import open_weights

_SHOWN = 5
_COMPARED = 256  # rows without a token that are looked at


def untrained_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: int, config: Any = None, weight: Tensor | None = None
) -> dict[str, int]:
    """Return the tokens without a trained row, with their ids.

    A row is not there beyond the end of the embedding. It is spare beyond the tokens that a Phi model ships with, and
    where it is zero or the same, bit for bit, as the row of an id that no token has.

    Args:
        tokenizer: The tokenizer of the run. Its padding token needs no row.
        rows: Of the model's embedding.
        config: The model's configuration.
        weight: The embedding; None: only ids are looked at.

    Shapes:
        weight (V, C).
    """
    vocabulary = tokenizer.get_vocab()
    shipped = tokens_that_ship(config) or rows
    spare = {index for index in vocabulary.values() if index >= min(rows, shipped)}
    if weight is not None:
        used = set(vocabulary.values())
        unused = [index for index in range(len(weight)) if index not in used][:_COMPARED]
        added = [index for index in tokenizer.added_tokens_decoder if index < len(weight)]
        spare |= _like_unused(weight, unused, added)
    spare.discard(tokenizer.pad_token_id)
    return {token: index for token, index in sorted(vocabulary.items(), key=lambda item: item[1]) if index in spare}


def _like_unused(weight: Tensor, unused: Iterable[int], candidates: Iterable[int]) -> set[int]:
    """Return the candidates whose rows are zero, or those of an unused id bit for bit."""
    spare = {_bits(weight[index]) for index in unused}
    return {index for index in candidates if not weight[index].any() or _bits(weight[index]) in spare}


def _bits(row: Tensor) -> bytes:
    return row.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def stored_embedding(folder: Path, model: PreTrainedModel) -> Tensor | None:
    """Return the input embedding in a model folder's files, memory-mapped; None where they do not hold it by itself."""
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    try:
        return open_weights(folder).get(f"{name}.weight")
    except ModelError:  # another form of weights; loading them says what is wrong
        return None


def notice(tokens: Mapping[str, int], rows: int, peft_config: Mapping[str, Any]) -> str | None:
    """Return what a person should know before training, or None where every token has a row or gets one.

    Args:
        tokens: Of `untrained_tokens`.
        rows: Of the model's embedding.
        peft_config: Of the run; what trains the embeddings makes spare rows trained ones.
    """
    missing = [token for token, index in tokens.items() if index >= rows]
    if missing:
        return (
            f"the tokenizer has {len(missing):,} tokens beyond the {rows:,} rows of the model's embedding "
            f"({_named(missing)}). A row with one of them cannot be trained. {MEND}"
        )
    trained = _trained_ids(peft_config)
    spare = {token: index for token, index in tokens.items() if trained is not None and index not in trained}
    if not spare:
        return None
    return (
        f"{len(spare):,} tokens of the tokenizer have a spare row of the embedding, which the base never learned "
        f"({_named(spare)}). LoRA does not train embeddings, so they would mean nothing: train their rows with "
        f"peft_config.trainable_token_indices: {{embed_tokens: {sorted(spare.values())[:_SHOWN]}}}, or do without them."
    )


MEND = (
    "Give the base a row for each and train those: model.resize_token_embeddings(len(tokenizer)), save both into one "
    "folder, and name it as model.name_or_path; or use the tokenizer that the base ships with"
)
"""What to do about tokens beyond the embedding."""


def _trained_ids(peft_config: Mapping[str, Any]) -> set[int] | None:
    """Return the ids whose rows train; None: all of them do."""
    targets = peft_config.get("target_modules")
    whole = {*(peft_config.get("modules_to_save") or ()), *(targets if isinstance(targets, Iterable) else ())}
    if not isinstance(targets, str) and any(str(name).endswith("embed_tokens") for name in whole):
        return None
    given = peft_config.get("trainable_token_indices") or ()
    lists = given.values() if isinstance(given, Mapping) else [given]
    return {int(index) for indices in lists for index in indices}


def _named(tokens: Iterable[str]) -> str:
    listed = list(tokens)
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")
