"""Compute the bytes that the decoder stack needs on a GPU from the sizes of its layers, without a device.

`footprint` adds them to the base, the adapter and the loss. tests/unit/decoder_stack/test_memory.py compares them
with the tensors of a real step, and with peaks measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from philora.decoder_stack.layer import Keep  # needs Triton

# The peak of a step in a CUDA graph was 1.4 to 2.4 GB above that of the same step without one, with 32 layers of 3,072
# columns, for 2,048 as for 8,192 tokens (benchmarks/results/gpu_prototype.csv).
GRAPH_BYTES_PER_LAYER_COLUMN = 2.4e9 / (32 * 3072)


@dataclass(frozen=True)
class StackSizes:
    """Sizes that the bytes of a decoder layer depend on.

    Attributes:
        layers: Decoder layers.
        hidden: Columns of the residual stream.
        feed_forward: Columns of SwiGLU's output.
        query: Columns of all query heads.
        key_value: Columns of all key heads, and of all value heads.
        heads: Query heads.
        ranks: Sum of the ranks of a layer's four adapters.
        element_bytes: Bytes of an activation.
        dropout: Whether LoRA dropout is on.
        fp8: Whether the base's products are in fp8.
        weights: Weights of the linear layers of all decoder layers.
    """

    layers: int
    hidden: int
    feed_forward: int
    query: int
    key_value: int
    heads: int
    ranks: int
    element_bytes: int = 2
    dropout: bool = False
    fp8: bool = False
    weights: int = 0

    @property
    def fused(self) -> int:
        """Return the columns of the fused q, k, v projection."""
        return self.query + 2 * self.key_value

    def layer_bytes(self, keep: Keep) -> float:
        """Return the bytes per token that one layer keeps on the device until its backward pass (`layer.Kept`)."""
        size = self.element_bytes
        if keep in ("input", "host"):
            return size * self.hidden if keep == "input" else 0
        # x1 and x2; q, k, v and attention's output; gate and up; u A^T of every adapter.
        elements = 2 * self.hidden + self.fused + self.query + 2 * self.feed_forward + self.ranks
        if keep == "everything":
            elements += 2 * self.hidden + self.feed_forward  # the norms' and SwiGLU's outputs
        # In fp32: one over the root mean square of both norms, and flash attention's normaliser per head.
        return size * elements + 4 * (2 + self.heads)

    def backward_bytes(self, keep: Keep) -> float:
        """Return the largest bytes per token of one layer's backward pass, besides the kept tensors."""
        c, i, q, f = self.hidden, self.feed_forward, self.query, self.fused
        again = keep == "elementwise"
        dropped = int(self.dropout)
        # The gradients of x and h, made by the next layer, exist throughout.
        stages = (
            i * (1 + again + 2 * dropped),  # of SwiGLU's output; the output again; dropout's copy, the adapter's part
            3 * i + i * dropped,  # the same, and that of gate and up
            2 * i + c * (1 + again + 2 * dropped),  # of gate and up, and of the norm's output
            2 * c + f + 2 * q,  # of x2 and of attention's output; of q, k, v; flash attention's sums in fp32
            c + 2 * f,  # of x2; of q, k, v apart and together
            c + f + c * (1 + again + 2 * dropped),  # of x2, of q, k, v, and of the norm's output
        )
        made_again = self.layer_bytes("everything") if keep in ("input", "host") else 0
        copies = 1 + 1 / self.element_bytes if self.fp8 else 1  # operands are also written in one byte
        return made_again + self.element_bytes * (2 * c + max(stages)) * copies

    def activation_bytes(self, tokens: int, keep: Keep) -> float:
        """Return the bytes that all layers keep on the device for a micro-batch, with the stack's in- and outputs."""
        # The sum of x and h that the last norm reads, and the norm's output; cos and sin in fp32; the ids, labels and
        # positions in int64. With inputs in host memory, two are being copied there and two back at a time.
        around = 2 * self.hidden * self.element_bytes + 4 * self.query / self.heads + 4 * 8
        if keep == "host":
            around += 4 * self.hidden * self.element_bytes
        return tokens * (around + self.layers * self.layer_bytes(keep))

    def pinned_bytes(self, tokens: int, keep: Keep) -> int:
        """Return the bytes in pinned host memory for a micro-batch."""
        return tokens * self.layers * self.hidden * self.element_bytes if keep == "host" else 0

    @property
    def fp8_bytes(self) -> int:
        """Return the bytes of the fp8 copies of the weights, one for each direction of the products."""
        return 2 * self.weights if self.fp8 else 0

    @property
    def graph_bytes(self) -> int:
        """Return the additional bytes of a CUDA graph of the layers."""
        return round(GRAPH_BYTES_PER_LAYER_COLUMN * self.layers * self.hidden)
