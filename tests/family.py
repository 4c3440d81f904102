"""The members of the family and other architectures at reduced width, for tests: real ratios, random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, Phi3Config, PreTrainedModel

from philora.families import PhiModel

HEAD, WINDOW = 8, 64
"""What a head's size and a window in tokens are divided by: the boundary of LongRoPE comes to lie at 64 tokens."""


def small_config(member: PhiModel, **changes: Any) -> Phi3Config:
    """The configuration of a member with narrow heads, short windows and two layers, in the words of its config.json.

    Kept: query heads to key heads, hidden size to feed-forward size, rotated part of a head, tied embeddings, whether
    and where the attention window and LongRoPE's boundary lie, one factor for each pair of rotated columns.
    """
    group = member.num_attention_heads // member.num_key_value_heads
    key_value_heads = 4 if group == 1 else 2
    heads = group * key_value_heads
    hidden = heads * member.head_dim // HEAD
    values: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": hidden,
        "intermediate_size": hidden * member.intermediate_size // member.hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": member.max_position_embeddings // WINDOW,
        "rope_theta": member.rope_theta,
        "sliding_window": member.sliding_window and member.sliding_window // WINDOW,
        "tie_word_embeddings": member.tie_word_embeddings,
        "partial_rotary_factor": member.partial_rotary_factor,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if member.original_max_position_embeddings is not None:
        values["original_max_position_embeddings"] = member.original_max_position_embeddings // WINDOW
    if member.rope_factors is not None:
        count = member.rope_factors // HEAD
        values["rope_scaling"] = {
            "type": "longrope",
            "short_factor": torch.linspace(1.0, 2.0, count).tolist(),
            "long_factor": torch.linspace(1.0, 64.0, count).tolist(),
        }
    return Phi3Config(**(values | changes))


def build(config: Any, seed: int = 0) -> PreTrainedModel:
    """A model of random weights whose logits are far from uniform, so that a fault shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.eval()


def tokens(count: int, seed: int = 0, vocabulary: int = 128) -> torch.Tensor:
    """Random ids that are no special token. Shape: (1, count)."""
    return torch.randint(3, vocabulary, (1, count), generator=torch.Generator().manual_seed(seed))


def packed(documents: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Documents in one row, as a collator without padding makes it."""
    positions = torch.cat([torch.arange(each.shape[1]) for each in documents])[None]
    return {"input_ids": torch.cat(documents, 1), "position_ids": positions}


def padded(documents: list[torch.Tensor], side: str = "right") -> dict[str, torch.Tensor]:
    """Documents in rows of one width."""
    width = max(each.shape[1] for each in documents)
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(documents):
        place = slice(0, each.shape[1]) if side == "right" else slice(width - each.shape[1], width)
        ids[row, place], mask[row, place] = each[0], 1
    return {"input_ids": ids, "attention_mask": mask}
