"""Compute the loss at labelled tokens only: log-probabilities of labels, without all logits at once.

Prompt tokens do not reach the output head. The log-probability of a label depends on its own hidden state only, so the
forward pass computes the gradient from the logits of a chunk, and the logits are computed once instead of twice.

`add_label_head` calls it before TRL's fused head, which computes every token on a CPU and recomputes the logits in
backward. Cases that it does not cover go to TRL's.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from philora.compat.trl import FusedCausalLMOutput, maybe_gather_lm_head_ctx
from philora.errors import DataError, fault
from philora.kernels.attention import NAME, packed_marker
from philora.kernels.layout import KEYWORDS, LABELS, LENGTHS, TOKENS, label_places
from philora.kernels.modules import only_rows
from philora.lora.functional import fused_enabled, records, refuse_create_graph
from philora.native import library as native

# Bytes of logits at a time, and the fewest rows of a product: with fewer, reading the weight would dominate.
CHUNK_BYTES = 32 << 20
FEWEST_TOKENS = 256
# Rows are rounded up to a multiple of this: on a CPU a product of 2,041 rows takes 7% more time than one of 2,048.
EVEN_TOKENS = 16
# Bytes of fp32 logits that a CPU computes at a time.
BLOCK_BYTES = 1 << 20

# Config keys of architectures that change the logits after the head; TRL's function computes these.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class LabelScores(NamedTuple):
    """For every label: log-probability, entropy of the distribution, and whether it is the most likely token."""

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor


class _LabelScores(torch.autograd.Function):
    """`log softmax(h W^T + b)[label]` by chunks; with p the softmax, the gradient is `dh = (onehot - p) W`.

    A product takes a chunk of labels. Between the products a CPU computes row by row in `native`, or a few rows that
    stay in the cache. The gradient of the logits overwrites the logits.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> tuple[Tensor, ...]:
        """Compute the scores. Shapes: hidden (N, C), weight (V, C), labels (N)."""
        needs_grad = ctx.needs_input_grad[0]
        count, vocabulary = len(labels), len(weight)
        scores = [torch.empty(count, dtype=torch.float32, device=hidden.device) for _ in range(3)]
        grad = torch.empty_like(hidden) if needs_grad else None
        chunk = CHUNK_BYTES // (vocabulary * weight.element_size()) // EVEN_TOKENS * EVEN_TOKENS
        chunk = min(count, max(FEWEST_TOKENS, chunk))
        memory = torch.empty(chunk, vocabulary, dtype=weight.dtype, device=weight.device)
        step = max(1, BLOCK_BYTES // (4 * vocabulary)) if hidden.device.type == "cpu" else max(1, chunk)
        for start in range(0, count, max(1, chunk)):
            part = slice(start, min(start + chunk, count))
            logits = memory[: part.stop - part.start]
            torch.mm(hidden[part], weight.t(), out=logits)
            outputs = [score[part] for score in scores]
            if native.usable(logits):
                native.score_rows_(logits, bias, labels[part], outputs, needs_grad)
            else:
                for first in range(0, len(logits), step):
                    rows = slice(first, first + step)
                    _score_rows(
                        logits[rows], bias, labels[part][rows], [output[rows] for output in outputs], needs_grad
                    )
            if grad is not None:
                torch.mm(logits, weight, out=grad[part])
        log_probs, entropy, is_top1 = scores
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient of every row by that of its log-probability."""
        refuse_create_graph()
        (grad,) = ctx.saved_tensors
        return None if grad is None else (grad * grads[0][:, None]).to(grad.dtype), None, None, None


def _score_rows(logits: Tensor, bias: Tensor | None, labels: Tensor, outputs: list[Tensor], needs_grad: bool) -> None:
    """Write log-probability, entropy and top-1 of some rows; the gradient overwrites the logits."""
    log_probs, entropy, is_top1 = outputs
    wide = logits.float()
    if bias is not None:
        wide = wide + bias
    chosen = wide.gather(-1, labels[:, None])[:, 0]
    largest = wide.amax(-1)
    probabilities = wide.softmax(-1)
    # The largest probability is one over the sum of exp(logit - largest): at least 1 / V, so its logarithm is safe.
    normaliser = largest - probabilities.amax(-1).log_()
    torch.sub(chosen, normaliser, out=log_probs)
    torch.sub(normaliser, torch.linalg.vecdot(probabilities, wide), out=entropy)
    is_top1.copy_(chosen >= largest)
    if needs_grad:
        torch.neg(probabilities, out=probabilities)
        logits.copy_(probabilities.scatter_add_(-1, labels[:, None], torch.ones_like(wide[:, :1])))


def label_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> LabelScores:
    """Return log-probability, entropy and top-1 of every label; `hidden` gets the log-probability's gradient.

    Shapes:
        hidden (N, C), weight (V, C), bias (V), labels (N) of token ids; returns three of (N), fp32.

    Raises:
        DataError: On a CPU, a label is not a row of the weight.

    Numerics:
        Logits are a product in hidden's dtype (under autocast: autocast's), everything after it is in fp32. The
        gradient of hidden is a product in that dtype, rounded once.

    Cost:
        4·N·C·V FLOPs with the gradient, none in backward; memory for 32 MiB of logits (or 256 rows), and N·C elements
        kept for backward.
    """
    device, count = hidden.device.type, len(labels)
    if device == "cpu" and not records():
        _check_labels(labels, len(weight))
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    missing = -count % EVEN_TOKENS if device == "cpu" else 0
    hidden, labels = nn.functional.pad(hidden, (0, 0, 0, missing)), nn.functional.pad(labels, (0, missing))
    with torch.autocast(device, enabled=False):
        scores = _LabelScores.apply(  # type: ignore[no-untyped-call]
            hidden.to(dtype), weight.detach().to(dtype), None if bias is None else bias.detach().float(), labels
        )
    return LabelScores(*(score[:count] for score in scores))


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    """Check that every label is a row of the head. On a GPU PyTorch's own functions check it. Shapes: labels (...).

    Raises:
        DataError: A label is not; the message has its index, its value and the vocabulary's size.
    """
    wrong = (labels < 0) | (labels >= vocabulary)
    if bool(wrong.any()):
        place = [int(item) for item in wrong.nonzero()[0]]
        expected = f"a token id from 0 to {vocabulary - 1:,}: the vocabulary has {vocabulary:,}"
        todo = "Tokens without loss have the label -100"
        raise DataError(fault("loss", f"labels{place}", int(labels[tuple(place)]), expected, todo))


def _without_padding(inputs: dict[str, Any], places: tuple[Tensor | None, ...]) -> Tensor | None:
    """Concatenate rows without their padding in place, so that they attend like the documents of a packed row.

    Returns:
        The index of every token in the rows with padding; None if the rows are not changed.
    """
    rows, bounds = places
    given = {name for name, item in inputs.items() if item is not None}
    if rows is None or bounds is None or given - {"input_ids", "attention_mask", "use_cache", LENGTHS}:
        return None
    ids = inputs["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    inputs["input_ids"], inputs["position_ids"] = (item.flatten()[None, rows] for item in (ids, positions))
    longest = max(inputs[LENGTHS])
    inputs |= dict(zip(KEYWORDS, (bounds, bounds, longest, longest), strict=True)) | {"attention_mask": None}
    return rows


def _even_rows(inputs: dict[str, Any]) -> int:
    """Add a document of padding to a packed row on a CPU, so that its length is fast in products.

    Args:
        inputs: The model's keyword arguments; `input_ids`, `position_ids` and given bounds of documents are replaced
            by longer ones.

    Returns:
        Number of tokens added to the row.
    """
    ids, positions = inputs.get("input_ids"), inputs.get("position_ids")
    others = any(inputs.get(name) is not None for name in ("attention_mask", "inputs_embeds", "past_key_values"))
    if others or not isinstance(ids, Tensor) or not isinstance(positions, Tensor) or positions.shape != ids.shape:
        return 0
    missing = -ids.shape[1] % EVEN_TOKENS
    if not missing or ids.device.type != "cpu" or len(ids) > 1:
        return 0
    inputs["input_ids"] = nn.functional.pad(ids, (0, missing))
    inputs["position_ids"] = torch.cat([positions, torch.arange(missing)[None].to(positions)], 1)
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if isinstance(bounds := inputs.get(name), Tensor):
            inputs[name] = torch.cat([bounds, bounds[-1:] + missing])
    for name in ("max_length_q", "max_length_k"):
        if inputs.get(name) is not None:
            inputs[name] = max(inputs[name], missing)
    if inputs.get(LENGTHS) is not None:
        inputs[LENGTHS] = (*inputs[LENGTHS], missing)
    return missing


@contextmanager
def _loaded(head: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield weight and bias of the output head, gathered and on the device that computes it.

    ZeRO-3 gathers a module's weights when it runs; the head does not run here, so they are gathered now. FSDP2 shards
    the head alone or with the last norm; after the norm has run, both are gathered. With a `device_map` that offloads
    the head to disk or to the CPU, accelerate keeps it on the meta device until it runs.
    """
    hook: Any = getattr(head, "_hf_hook", None) if cast(Tensor, head.weight).is_meta else None
    if hook is not None:
        hook.pre_forward(head)
    weight, bias = (item.full_tensor() if isinstance(item, DTensor) else item for item in (head.weight, head.bias))
    try:
        with maybe_gather_lm_head_ctx(weight, bias):
            yield cast(Tensor, weight), cast("Tensor | None", bias)
    finally:
        if hook is not None:
            hook.post_forward(head, None)


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, without the class that FSDP2 derives for a sharded module."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def _recomputes(model: PreTrainedModel) -> bool:
    """Return whether backward computes layers again, by transformers' checkpointing or by FSDP's wrapper."""
    return any(
        isinstance(module, CheckpointWrapper) or getattr(module, "gradient_checkpointing", False)
        for module in model.modules()
    )


def _scored(
    model: PreTrainedModel, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Tensor,
    places: list[tuple[Tensor | None, ...]], count: Tensor | int | None,
) -> FusedCausalLMOutput:  # fmt: skip
    """Compute the decoder and the loss of the labels; `places` has the batch's values of `LABELS` and `TOKENS`.

    Shapes:
        labels (B, T).
    """
    shape, (rows, ids) = labels.shape, places[0]
    if rows is None or ids is None:
        rows, ids = label_places(labels)
    packed = kwargs.get(LENGTHS) is not None
    laid = _without_padding(kwargs, places[1]) if packed and not args else None
    at = rows if laid is None else torch.searchsorted(laid, rows)
    added = _even_rows(kwargs)
    expected = (shape[0], shape[1] + added) if laid is None else (1, len(laid) + added)
    if packed and kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = packed_marker(labels)
    skips = nullcontext() if model.training and _recomputes(model) else only_rows(at, expected[0] * expected[1])
    with skips:
        hidden = model.base_model(*args, **kwargs).last_hidden_state
    if hidden.shape[:2] != expected:
        raise RuntimeError(f"labels of shape {tuple(shape)} do not fit the model's output")
    with _loaded(head) as (weight, bias):
        # With a `device_map` the head may be on another device than the last norm, as with tied embeddings.
        hidden, rows, at, ids, labels = (item.to(weight.device) for item in (hidden, rows, at, ids, labels))
        scores = label_scores(hidden.flatten(0, 1).index_select(0, at), weight, bias, ids)
    found = [score.new_zeros(shape.numel()).index_copy(0, rows, score).view(shape)[:, :-1] for score in scores]
    loss = -scores.log_probs.sum() / (max(1, len(rows)) if count is None else count)
    names = dict(zip(("log_probs", "entropy", "is_top1"), found, strict=True))
    return FusedCausalLMOutput(loss=loss, label_mask=labels[:, 1:] != -100, **names)


def add_label_head(model: PreTrainedModel) -> None:
    """Make `model(..., labels=..., fused_lm_head=True)`, as TRL's trainer calls it, score labelled tokens only.

    TRL has added its fused head to the model.
    """
    trl_forward = model.forward
    config = model.config.get_text_config()
    plain_logits = all(getattr(config, name, None) is None for name in LOGIT_CHANGES)

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        head = self.get_output_embeddings()
        labels = kwargs.get("labels")
        places = [tuple(kwargs.pop(name, None) for name in names) for names in (LABELS, TOKENS)]
        packed = self.config._attn_implementation == NAME and kwargs.get(LENGTHS) is not None and fused_enabled()
        if not packed:
            kwargs.pop(LENGTHS, None)
        if (
            not kwargs.get("fused_lm_head", False)
            or not plain_logits
            or _class_of(head) is not nn.Linear
            or type(head.weight) not in (nn.Parameter, Tensor, DTensor)
            or head.weight.requires_grad
            or labels is None
            or kwargs.get("shift_labels") is not None
            or getattr(config, "output_router_logits", False)
            or not fused_enabled()
        ):
            return trl_forward(*args, **kwargs)
        for name in ("fused_lm_head", "labels", "shift_labels"):
            kwargs.pop(name, None)
        count = kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        if labels.device.type == "cpu":
            _check_labels(labels.masked_fill(labels == -100, 0), head.out_features)
        return _scored(self, head, args, kwargs, labels, places, count)

    forward.__wrapped__ = getattr(trl_forward, "__wrapped__", trl_forward)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)
