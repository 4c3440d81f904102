"""List the private names of bitsandbytes that kernels/quantization.py uses."""

from __future__ import annotations

from philora.compat.private_names import PrivateName

PRIVATE = (
    PrivateName(
        "bitsandbytes.functional._convert_weight_packed_for_cpu_inverse",
        "reads 4-bit weights in the layout of a CPU",
        "dequantize_4bit does not support that layout",
    ),
    PrivateName(
        "bitsandbytes.autograd._functions.MatmulLtState",
        "its class is replaced by `__class__`, so that products in evaluation round as in training",
        "no public switch keeps the threshold path",
    ),
)
