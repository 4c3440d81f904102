"""Compare a decoder layer with plain PEFT, before the first use of the stack on a machine.

Drivers, compilers and GPUs differ, and a kernel that is wrong on one of them would train wrongly without an error. So
a layer is computed once on a few tokens, and compared with transformers' and PEFT's own code in the same dtype. An
agreement is cached for this GPU and these versions. Otherwise the stack stays off, with one warning.
"""

from __future__ import annotations

import hashlib
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from philora.decoder_stack.choice import ModelFacts
from philora.decoder_stack.facts import linears_of, triton_version
from philora.decoder_stack.products import Scaling, fp8_scaling
from philora.decoder_stack.rows import Dropout, kept_by_dropout
from philora.files.checkpoint import read_json, write_json
from philora.kernels.layout import PackedLayout
from philora.runtime.user_cache import user_cache

logger = logging.getLogger(__name__)

LENGTHS = (3, 17, 1, 30)  # tokens of the documents, some shorter and some longer than the window
WINDOW_TOKENS = 13
LARGEST_DIFFERENCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""The largest difference relative to the norm. bf16 itself changes gradients by 0.023 (measured on an H200)."""
LARGEST_DIFFERENCE_IN_FP8 = 0.15
"""The same with 3 bits of mantissa; emulated on a CPU the gradients of this layer differ by 0.03."""


class Differences(NamedTuple):
    """Relative differences of the stack from plain PEFT.

    Attributes:
        output: Difference of the layer's output.
        gradients: The largest difference of the gradients of A, B and the input.
    """

    output: float
    gradients: float


def disagreement(device: torch.device, facts: ModelFacts) -> str | None:
    """Return in words how the stack differs from plain PEFT on this device, or None if it agrees."""
    return _disagreement(device, facts.dtype, facts.head_size, facts.lora_dropout > 0, facts.base)


@cache
def _disagreement(device: torch.device, dtype: str, head_size: int, with_dropout: bool, base: str) -> str | None:
    properties = torch.cuda.get_device_properties(device)
    versions = (torch.__version__, triton_version(), transformers.__version__, peft.__version__, _own_digest())
    key = "; ".join(map(str, (properties.name, *versions, dtype, head_size, with_dropout, base)))
    path = Path(os.environ.get("PHILORA_CACHE") or user_cache()).expanduser() / "decoder_stack.json"
    known = read_json(path)
    if key in known:
        return None
    try:
        found = compare(device, getattr(torch, dtype), head_size, 0.25 if with_dropout else 0.0, base)
    except Exception as error:  # noqa: BLE001 - Triton's errors have no narrower class
        return f"the decoder stack does not run here ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    largest = LARGEST_DIFFERENCE_IN_FP8 if base == "fp8" else LARGEST_DIFFERENCE[dtype]
    if not max(found) < largest:
        return f"the decoder stack differs from plain PEFT here by {max(found):.2g} (at most {largest:g} is rounding)"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known | {key: max(found)})
    except OSError:
        logger.info("the comparison of the decoder stack with plain PEFT is not cached: %s cannot be written", path)
    return None


@cache
def _own_digest() -> str:
    """Return a digest of the stack's own files, so that a changed kernel is compared again."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def compare(
    device: torch.device, dtype: torch.dtype, head_size: int = 16, dropout: float = 0.0, base: str = "plain"
) -> Differences:
    """Compute one layer of random weights by the stack and by plain PEFT, and return the differences.

    The weights are small and always the same. The states of random generators are restored.

    Args:
        device: Device of both computations.
        dtype: Dtype of weights and activations.
        head_size: Columns of a head.
        dropout: Probability of LoRA's dropout.
        base: "nf4" to quantise the frozen weights, for PEFT too; "fp8" for the stack's base products in fp8.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        torch.manual_seed(0)
        model = _model(device, dtype, head_size, dropout, base)
        tokens = sum(LENGTHS)
        x, grad = (torch.randn(tokens, model.config.hidden_size, device=device).to(dtype) for _ in range(2))
        mine = _by_stack(model, x, grad, fp8_scaling(device, dtype) if base == "fp8" else None)
        theirs = _by_peft(model, x, grad)
    relative = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(mine, theirs, strict=True)]
    return Differences(relative[0], max(relative[1:]))


def _model(device: torch.device, dtype: torch.dtype, head_size: int, dropout: float, base: str) -> Any:
    heads = 4
    config = Phi3Config(
        vocab_size=32, hidden_size=heads * head_size, intermediate_size=2 * heads * head_size, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=2, sliding_window=WINDOW_TOKENS, max_position_embeddings=128,
        original_max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager",
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
    phi = Phi3ForCausalLM(config).to(dtype)
    if base == "nf4":
        _quantize(phi)
    model = peft.get_peft_model(phi, lora).to(device)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    return model.get_base_model().model.train()


def _quantize(phi: Any) -> None:
    """Put bitsandbytes' layers in NF4 where the decoder layers have linear ones; they are quantised on the device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in phi.model.layers:
        for name, linear in [item for item in layer.named_modules() if isinstance(item[1], nn.Linear)]:
            rows, columns = linear.weight.shape
            made = Linear4bit(columns, rows, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4")
            made.weight = Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
            layer.set_submodule(name, made)
    phi.is_loaded_in_4bit = True  # by this PEFT chooses its own layer for them


_COUNTER = 7


def _by_stack(model: Any, x: Tensor, grad: Tensor, fp8: Scaling | None) -> list[Tensor]:
    from philora.decoder_stack.stack import DecoderStack  # needs Triton

    layout = PackedLayout.of_lengths(LENGTHS).to(x.device)
    assert layout.position_ids is not None
    cos, sin = model.rotary_emb(x, position_ids=layout.position_ids[None])
    half = cos.shape[-1] // 2
    leaf = x.clone().requires_grad_()
    counter = torch.tensor([_COUNTER], device=x.device)
    cos, sin = (item[0, :, :half].float().contiguous() for item in (cos, sin))
    residual, added = DecoderStack(model, x.dtype, fp8)(leaf, cos, sin, layout, counter=counter)
    return _gradients(model, leaf, residual + added, grad)


def _by_peft(model: Any, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Compute the layer with transformers and PEFT, document by document, with the masks of the stack's hash."""
    from philora.decoder_stack.stack import seeds_of  # needs Triton

    linears = linears_of(model.layers[0])
    seeds = seeds_of(torch.tensor([_COUNTER], device=x.device), len(linears))
    for index, linear in enumerate(linears):
        p = getattr(linear.lora_dropout["default"], "p", 0.0)
        if p:
            linear.lora_dropout["default"] = SameMasks(Dropout(seeds[index : index + 1], p))
    leaf, outputs, start = x.clone().requires_grad_(), [], 0
    for length in LENGTHS:
        part = leaf[start : start + length]
        for linear in linears:
            if isinstance(linear.lora_dropout["default"], SameMasks):
                linear.lora_dropout["default"].first = start
        places = torch.arange(length, device=x.device)
        distance = places[:, None] - places
        mask = torch.zeros(length, length, device=x.device, dtype=x.dtype)
        mask.masked_fill_((distance < 0) | (distance >= WINDOW_TOKENS), torch.finfo(x.dtype).min)
        angles = model.rotary_emb(x, position_ids=places[None])
        outputs.append(model.layers[0](part[None], attention_mask=mask[None, None], position_embeddings=angles)[0])
        start += length
    return _gradients(model, leaf, torch.cat(outputs), grad)


class SameMasks(nn.Module):
    """Dropout with the masks of the kernels, for rows of a packed batch.

    Attributes:
        dropout: Seed and probability.
        first: Index of the first row.
    """

    def __init__(self, dropout: Dropout, first: int = 0) -> None:
        super().__init__()
        self.dropout, self.first = dropout, first

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout. Shapes: x (..., T, columns); returns the same."""
        kept = kept_by_dropout(self.first + x.shape[-2], x.shape[-1], self.dropout)[self.first :]
        return x * kept.to(x.dtype) / (1.0 - self.dropout.p)


def _gradients(model: Any, leaf: Tensor, output: Tensor, grad: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input, of A and of B."""
    output.backward(grad)  # type: ignore[no-untyped-call]
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    found = [output.detach(), leaf.grad, *(item.grad for item in trained)]
    for item in trained:
        item.grad = None
    return found
