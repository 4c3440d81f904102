"""Choose LongRoPE's factors by document, so that they do not depend on packing or padding.

The long-context Phi models have two sets of rotary frequencies: short factors for sequences of up to
`original_max_position_embeddings` tokens (4,096), and long ones for longer sequences. transformers chooses by the
longest row of a batch. So in training one long row changes the others, and a row that is padded beyond the boundary
gets the long factors even if it is short. At inference, alone, it would have the factors of its own length. Here every
document has the factors of its own length.

With a cache the choice is left to transformers, since the keys of earlier calls are rotated already.
`philora.generation.batches` keeps prompts on different sides of the boundary in different batches.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3Model
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding as PlainPhi3RotaryEmbedding

from philora.families import longrope_switch_tokens

_PARAMETERS = tuple(inspect.signature(Phi3Model.forward).parameters)[1:]


class DocumentRotaryEmbedding(PlainPhi3RotaryEmbedding):  # type: ignore[misc]
    """Phi-3's rotary embedding with LongRoPE's factors chosen by document.

    `note_documents`, a hook of the model, sets the lengths before every forward pass.
    """

    document_tokens: Tensor | None = None

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, scaled as in transformers. Both sets of factors have the same scaling.

        Shapes:
            x (B, T, C), position_ids (B or 1, T); returns two of (B or 1, T, rotated columns), in x's dtype.

        Numerics:
            For one document the same bits as transformers: positions times frequencies in fp32.
        """
        tokens, self.document_tokens = self.document_tokens, None
        if tokens is None:
            return cast("tuple[Tensor, Tensor]", super().forward(x, position_ids))
        switch = int(self.config.rope_parameters["original_max_position_embeddings"])
        short = self.original_inv_freq.to(x.device, torch.float)
        frequencies = torch.where((tokens > switch)[..., None], self._long_frequencies(switch, x.device), short)
        half = position_ids[..., None].float() * frequencies
        angles = torch.cat((half, half), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)

    def _long_frequencies(self, switch: int, device: torch.device) -> Tensor:
        """Return the long frequencies, cached under transformers' name so that both use the same cache."""
        known: Tensor | None = getattr(self, "long_inv_freq", None)
        if known is None or known.device != device:
            known, _ = ROPE_INIT_FUNCTIONS["longrope"](self.config, device, seq_len=switch + 1)
            self.long_inv_freq = known
        return known


DocumentRotaryEmbedding.__name__ = PlainPhi3RotaryEmbedding.__name__


def document_tokens(position_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
    """Return the length of every token's document.

    Args:
        position_ids: Positions, if given; a document begins wherever one is not the previous plus one.
        attention_mask: 0 at padding; without `position_ids` a row is one document.

    Returns:
        The lengths; None if only the width of the batch is known, which is the length of all rows.

    Shapes:
        position_ids (B or 1, T), attention_mask (B, T); returns (B or 1, T) or (B, 1) of int64.
    """
    if position_ids is None:
        return None if attention_mask is None else attention_mask.bool().sum(1, keepdim=True)
    positions = position_ids
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    if attention_mask is not None and attention_mask.shape[1] == positions.shape[1]:
        rows = len(attention_mask)
        positions, begins = positions.expand(rows, -1), begins.expand(rows, -1)
        positions = positions.masked_fill(~attention_mask.bool(), -1)
    document = begins.flatten().cumsum(0) - 1
    lengths = torch.zeros_like(document).scatter_reduce(0, document, positions.flatten().long() + 1, "amax")
    return lengths.index_select(0, document).view(positions.shape)


def note_documents(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set the lengths of documents in the rotary embedding, as a forward pre-hook of `Phi3Model`."""
    if not isinstance(model.rotary_emb, DocumentRotaryEmbedding):
        return  # its class was changed back
    given = dict(zip(_PARAMETERS, args, strict=False)) | kwargs
    model.rotary_emb.document_tokens = None
    use_cache = given.get("use_cache")
    use_cache = model.config.use_cache if use_cache is None else use_cache
    if given.get("past_key_values") is not None or (use_cache and not model.training):
        return
    mask = given.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    positions = given.get("position_ids")
    if positions is None and inputs is not None and inputs.shape[1] <= (longrope_switch_tokens(model.config) or 0):
        return  # all rows are short and can share one row of cosines
    model.rotary_emb.document_tokens = document_tokens(positions, mask)


def use_document_rotary(model: nn.Module) -> None:
    """Make every Phi-3 model with LongRoPE inside `model` choose its factors by document, in place. Idempotent.

    A hook passes the lengths, not a subclass: transformers looks up recordable outputs by the model's class.
    """
    for module in model.modules():
        if not isinstance(module, Phi3Model) or longrope_switch_tokens(module.config) is None:
            continue
        if type(module.rotary_emb) is PlainPhi3RotaryEmbedding:
            module.rotary_emb.__class__ = DocumentRotaryEmbedding
        if note_documents not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(note_documents, with_kwargs=True)
