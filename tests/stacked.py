"""A small Phi-3 model by the decoder stack and by plain PEFT, document by document, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
from peft import LoraConfig
from torch import Tensor

from philora import optimize
from philora.decoder_stack.facts import linears_of
from philora.decoder_stack.model import configure
from philora.decoder_stack.rows import Dropout
from philora.decoder_stack.stack import seeds_of
from philora.decoder_stack.trial import SameMasks
from tests.conftest import make_phi3

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on a CPU through Triton's interpreter
LENGTHS = (1, 4, 2)  # every token of every kernel is a program of the interpreter: few tokens
SEED = 5


def make(
    layers: int = 1, dropout: float = 0.0, lora: dict[str, Any] | None = None, base: Any = None, **config: Any
) -> Any:
    """A PEFT model with random A and B, without philora's fast paths.

    Args:
        layers: Decoder layers.
        dropout: Of LoRA.
        lora: Further arguments of LoraConfig.
        base: The model; default: a small Phi-3 with grouped queries.
        **config: Of the small Phi-3.
    """
    base = make_phi3(num_hidden_layers=layers, **config) if base is None else base
    settings = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "lora_dropout": dropout} | (lora or {})
    model = peft.get_peft_model(base, LoraConfig(**settings, init_lora_weights=False))
    return model.to(DEVICE).train()


def inputs(model: Any, lengths: Sequence[int] = LENGTHS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Embeddings of the documents, and a gradient of the output. Shapes: both (1, T, C)."""
    generator = torch.Generator().manual_seed(2)
    shape = 1, sum(lengths), model.config.hidden_size
    x, grad = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(2))
    return x, grad


def positions(lengths: Sequence[int] = LENGTHS) -> Tensor:
    """Positions of a packed row. Shape: (1, T)."""
    return torch.cat([torch.arange(each) for each in lengths])[None].to(DEVICE)


def by_peft(model: Any, lengths: Sequence[int] = LENGTHS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Output, gradient of the input and of all that trains, by transformers' and PEFT's code, a document at a time.

    Dropout has the masks that the stack draws in its first pass from `SEED`.
    """
    decoder = model.get_base_model().model
    linears = [each for layer in decoder.layers for each in linears_of(layer)]
    seeds = seeds_of(torch.tensor([SEED], device=DEVICE), len(linears))
    before = {}
    for index, linear in enumerate(linears):
        drop = getattr(linear, "lora_dropout", {})
        if "default" in drop and getattr(drop["default"], "p", 0.0):
            before[index] = drop["default"]
            drop["default"] = SameMasks(Dropout(seeds[index : index + 1], before[index].p))
    x, grad = inputs(model, lengths, dtype)
    leaf, outputs, start = x.requires_grad_(), [], 0
    for length in lengths:
        for index in before:
            linears[index].lora_dropout["default"].first = start
        part = leaf[:, start : start + length]
        outputs.append(decoder(inputs_embeds=part, position_ids=positions([length]), use_cache=False)[0])
        start += length
    for index, drop in before.items():
        linears[index].lora_dropout["default"] = drop
    return _found(model, leaf, torch.cat(outputs, 1), grad)


def by_stack(
    model: Any,
    lengths: Sequence[int] = LENGTHS,
    dtype: torch.dtype = torch.float32,
    recomputation: str = "none",
    **settings: Any,
) -> dict[str, Tensor]:
    """The same by the stack, the documents packed in one row.

    Args:
        model: From `make`; it is optimised here.
        lengths: Of the documents.
        dtype: Of the embeddings.
        recomputation: "none", "elementwise" or "full".
        **settings: Of the stack.
    """
    optimize(model, recomputation="elementwise" if recomputation == "elementwise" else "none")
    decoder = model.get_base_model().model
    for layer in decoder.layers:
        layer.gradient_checkpointing = recomputation == "full"
    configure(model, seed=SEED, counter=0, **settings)
    x, grad = inputs(model, lengths, dtype)
    leaf = x.requires_grad_()
    output = decoder(inputs_embeds=leaf, position_ids=positions(lengths), use_cache=False)[0]
    assert output.grad_fn is not None
    return _found(model, leaf, output, grad)


def _found(model: Any, leaf: Tensor, output: Tensor, grad: Tensor) -> dict[str, Tensor]:
    output.backward(grad)
    found = {"output": output.detach(), "input": leaf.grad}
    for name, each in model.named_parameters():
        if each.grad is not None:
            found[name], each.grad = each.grad.float(), None
    return found


def largest_difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of a tensor relative to its norm."""
    assert mine.keys() == theirs.keys()
    return max(float((mine[name].float() - each.float()).norm() / each.norm()) for name, each in theirs.items())
