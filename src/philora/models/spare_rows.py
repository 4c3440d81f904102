"""Find tokens that the model never learned: their rows of the embedding are spare or missing."""

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
_COMPARED = 256  # rows without a token that are compared


def untrained_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: int, config: Any = None, weight: Tensor | None = None
) -> dict[str, int]:
    """Return the tokens without a trained row, with their ids. Shapes: weight (V, C).

    A token beyond the end of the embedding has no row. A row is spare if it is beyond the tokens that a Phi model ships
    with, if it is zero, or if it has the same bits as the row of an id without a token.

    Args:
        tokenizer: The tokenizer of the run. Its padding token needs no row.
        rows: Rows of the model's embedding.
        config: The model's configuration.
        weight: The embedding; None to check ids only.
    """
    vocabulary = tokenizer.get_vocab()
    shipped = tokens_that_ship(config) or rows
    spare = {index for index in vocabulary.values() if index >= min(rows, shipped)}
    if weight is not None:
        used = set(vocabulary.values())
        unused = [index for index in range(len(weight)) if index not in used][:_COMPARED]
        added = [index for index in tokenizer.added_tokens_decoder if index < len(weight)]
        rows_of_unused = {_bits(weight[index]) for index in unused}
        spare |= {index for index in added if not weight[index].any() or _bits(weight[index]) in rows_of_unused}
    spare.discard(tokenizer.pad_token_id)
    return {token: index for token, index in sorted(vocabulary.items(), key=lambda item: item[1]) if index in spare}


def _bits(row: Tensor) -> bytes:
    return row.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def stored_embedding(folder: Path, model: PreTrainedModel) -> Tensor | None:
    """Return the memory-mapped input embedding in a model folder's files; None if they have no such tensor."""
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    try:
        return open_weights(folder).get(f"{name}.weight")
    except ModelError:  # another form of weights; loading them explains the error
        return None


def notice(tokens: Mapping[str, int], rows: int, peft_config: Mapping[str, Any]) -> str | None:
    """Return a notice about `untrained_tokens` before training, or None if all rows are or will be trained."""
    missing = [token for token, index in tokens.items() if index >= rows]
    if missing:
        return (
            f"the tokenizer has {len(missing):,} tokens beyond the {rows:,} rows of the model's embedding "
            f"({_named(missing)}). Text with one of them cannot be trained on. {ADVICE}"
        )
    trained = _trained_ids(peft_config)
    spare = {token: index for token, index in tokens.items() if trained is not None and index not in trained}
    if not spare:
        return None
    return (
        f"{len(spare):,} tokens of the tokenizer have a spare row of the embedding, which the base never learned "
        f"({_named(spare)}). LoRA does not train embeddings, so they would have no meaning: train their rows with "
        f"peft_config.trainable_token_indices: {{embed_tokens: {sorted(spare.values())[:_SHOWN]}}}, or do without them."
    )


ADVICE = (
    "Add a row per token to the base and train it: call model.resize_token_embeddings(len(tokenizer)), save model and "
    "tokenizer in one folder, and set model.name_or_path to it; or use the base's own tokenizer"
)
"""What to do about tokens beyond the embedding."""


def _trained_ids(peft_config: Mapping[str, Any]) -> set[int] | None:
    """Return the ids whose rows train; None if all of them do."""
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
