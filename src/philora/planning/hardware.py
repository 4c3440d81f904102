"""Write notices about the limits of a device before a run, from facts and without the device."""

from __future__ import annotations

from collections.abc import Sequence

from philora.decoder_stack.choice import DeviceFacts
from philora.kernels.attention_choice import LEAST_CAPABILITY


def hardware_notices(device: DeviceFacts, dtype: str, cuda: str | None, use_cpu: bool = False) -> Sequence[str]:
    """Return notices about the device of a run.

    Args:
        device: Facts of the device.
        dtype: `model.dtype` of the configuration.
        cuda: The version of CUDA that PyTorch was built for, or None.
        use_cpu: Whether the run is configured to use the CPU.
    """
    return tuple(filter(None, [None if use_cpu else unusable_gpu(device, cuda), old_gpu(device, dtype)]))


def unusable_gpu(device: DeviceFacts, cuda: str | None) -> str | None:
    """Return why a GPU is not used, with advice; None if there is no GPU or it works.

    Args:
        device: The device that is used instead; its `problem` has PyTorch's message.
        cuda: The version of CUDA that PyTorch was built for.
    """
    problem = device.problem
    if problem is None:
        return None
    if "too old" in problem:
        return (
            f"the NVIDIA driver is older than PyTorch's CUDA {cuda}, so the GPU is not used and the run computes on "
            f"{device.name} ({problem}). Update the driver, or install a PyTorch that is built for an older CUDA."
        )
    return (
        f"the GPU cannot be used and the run computes on {device.name}: {problem}. "
        f"Check whether nvidia-smi works, or set training_config.use_cpu to true."
    )


def old_gpu(device: DeviceFacts, dtype: str) -> str | None:
    """Return a notice about a GPU without bf16 and flash attention; None for others. `dtype` is `model.dtype`."""
    if device.kind != "cuda" or device.capability is None or device.capability >= LEAST_CAPABILITY:
        return None
    own = ".".join(map(str, device.capability))
    text = f"{device.name} has compute capability {own}: no bf16 and no flash attention, so training is slow there"
    if dtype == "float16":
        return f"{text}."
    half = "model.dtype=float16 with training_config.fp16=true uses its fast products and half of the memory"
    if dtype == "bfloat16":
        return f"{text}, and bf16 is emulated. {half}."
    return f"{text}, and weights are in float32. {half}."


def slow_bf16(float32_peak_bytes: int, usable_bytes: int) -> str:
    """Return the notice for a base in bf16 on a CPU without bf16 instructions, by the peak with a base in fp32."""
    text = "this processor has no bf16 instructions (AVX512-BF16 or AMX): products in bf16 take many times longer"
    peak, usable = float32_peak_bytes / 1e9, usable_bytes / 1e9
    if float32_peak_bytes <= usable_bytes:
        return f"{text}. Set model.dtype to float32: the run then needs about {peak:.2f} GB of {usable:.2f} GB."
    return (
        f"{text}. In float32 the run would need about {peak:.2f} GB, and {usable:.2f} GB can be used: lower "
        f"max_length or the batch, or take a machine with more memory, and set model.dtype to float32."
    )
