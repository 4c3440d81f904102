"""Choose how the documents of a packed batch attend outside the decoder stack: one function of facts.

| way          | what runs                                                                                      |
| ------------ | ---------------------------------------------------------------------------------------------- |
| `tiles`      | philora's own on a CPU                                                                         |
| `flash`      | one call of PyTorch's flash attention, the kernel of `torch.nn.attention.varlen`; in fp16 only |
|              | with `PHILORA_STACK=all`                                                                       |
| `flash-attn` | one call of the package flash-attn; only with `PHILORA_STACK=all`, since no GPU has run it yet |
| `groups`     | PyTorch's scaled_dot_product_attention for documents of about equal length                     |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Way = Literal["tiles", "flash", "flash-attn", "groups"]

LEAST_CAPABILITY = (8, 0)  # for flash attention
LARGEST_HEAD_SIZE = 256


@dataclass(frozen=True)
class AttentionFacts:
    """The facts that the choice depends on.

    Attributes:
        kind: Type of the device: "cuda", "cpu" or another.
        capability: CUDA's compute capability, or None.
        dtype: Dtype of queries, keys and values, such as "bfloat16".
        head_size: Columns of a head.
        dropout: Whether attention weights are dropped.
        flash: Whether PyTorch has flash attention for documents of any lengths.
        package: Whether the package flash-attn is installed.
        switch: Value of `PHILORA_STACK`: "all" also takes what no GPU has run yet.
        disagreement: How PyTorch's flash attention differs from the reference, or None.
    """

    kind: str = "cuda"
    capability: tuple[int, int] | None = (9, 0)
    dtype: str = "bfloat16"
    head_size: int = 96
    dropout: bool = False
    flash: bool = True
    package: bool = False
    switch: str = ""
    disagreement: str | None = None


def attention_for(facts: AttentionFacts) -> tuple[Way, str]:
    """Return the way, and the reason for it."""
    if facts.kind != "cuda":
        if facts.kind == "cpu" and not facts.dropout:
            return "tiles", "the device is a CPU"
        return "groups", "attention weights are dropped" if facts.kind == "cpu" else f"the device is {facts.kind}"
    why = _no_flash_kernel(facts)
    if why is not None:
        return "groups", why
    if facts.dtype != "bfloat16" and facts.switch != "all":
        return "groups", f"no GPU has run flash attention in {facts.dtype} here yet, PHILORA_STACK=all takes it"
    if facts.flash and facts.disagreement is not None:
        return "groups", facts.disagreement
    if facts.flash:
        return "flash", "PyTorch has flash attention for packed rows"
    if facts.package and facts.switch == "all":
        return "flash-attn", "this PyTorch has no flash attention for packed rows, flash-attn is installed"
    todo = "; PHILORA_STACK=all takes flash-attn, which no GPU has run yet" if facts.package else ""
    return "groups", f"this PyTorch has no flash attention for packed rows{todo}"


def _no_flash_kernel(facts: AttentionFacts) -> str | None:
    """Return why no flash kernel takes these heads, or None."""
    if facts.dtype not in ("bfloat16", "float16"):
        return f"there is no flash attention in {facts.dtype}"
    if facts.capability is not None and facts.capability < LEAST_CAPABILITY:
        own, least = (".".join(map(str, item)) for item in (facts.capability, LEAST_CAPABILITY))
        return f"flash attention needs compute capability {least}, this is {own}"
    if facts.head_size > LARGEST_HEAD_SIZE or facts.head_size % 8:
        return f"heads have {facts.head_size} columns, flash attention takes multiples of 8 up to {LARGEST_HEAD_SIZE}"
    if facts.dropout:
        return "attention weights are dropped"
    return None
