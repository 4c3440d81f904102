"""List the private names of PyTorch that philora uses."""

from __future__ import annotations

import torch

from philora.compat.private_names import PrivateName

_HOOKS = "a fast path must not skip hooks, and no public name returns whether there are any"

PRIVATE = (
    PrivateName("torch.nn.Module._forward_hooks", _HOOKS, "hooks can be added in public, not listed"),
    PrivateName("torch.nn.Module._forward_pre_hooks", _HOOKS, "hooks can be added in public, not listed"),
    PrivateName("torch.nn.Module._backward_hooks", _HOOKS, "hooks can be added in public, not listed"),
    PrivateName("torch.nn.modules.module._global_forward_hooks", _HOOKS, "hooks can be added in public, not listed"),
    PrivateName("torch.nn.modules.module._global_forward_pre_hooks", _HOOKS, "as above"),
    PrivateName("torch.nn.modules.module._global_backward_hooks", _HOOKS, "as above"),
    PrivateName("torch.nn.modules.module._global_backward_pre_hooks", _HOOKS, "as above"),
    PrivateName("torch.nn.Module._modules", "changes parts of a module in place", "setattr refuses some replacements"),
    PrivateName("torch.nn.Module._parameters", "changes parameters in place", "setattr refuses tensors"),
    PrivateName("torch.nn.Module._apply", "merged weights follow .to()", "no public hook for .to()"),
    PrivateName("torch.nn.Module._load_from_state_dict", "reads loralib's states", "hooks see one module's keys late"),
    PrivateName("torch.nn.Conv2d._conv_forward", "convolves with another weight", "padding modes are in it alone"),
    PrivateName("torch.Tensor._version", "a tensor that was written to since is not used again", "none"),
    PrivateName("torch.Tensor._backward_hooks", _HOOKS, "hooks can be added in public, not listed"),
    PrivateName("torch.Tensor._is_zerotensor", "the functions in C need real memory", "none"),
    PrivateName("torch.optim.Adam._step_supports_amp_scaling", "a step is skipped on the device", "GradScaler's own"),
    PrivateName("torch._C._is_tracing", "the fused function is not traced", "torch.jit.is_tracing costs a call more"),
    PrivateName("torch._C._are_functorch_transforms_active", "falls back under torch.func", "none"),
    PrivateName("torch._C._len_torch_dispatch_stack", "falls back under dispatch modes", "none"),
    PrivateName(
        "torch.fx._symbolic_trace.is_fx_symbolic_tracing",
        "the fused function is not traced by torch.fx",
        "torch.fx has no public name for it",
    ),
    PrivateName(
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper",
        "a head that FSDP wrapped for recomputation is found in its wrapper",
        "none",
    ),
    PrivateName(
        "torch._C._has_mkldnn", "whether oneDNN's products are there", "torch.backends.mkldnn costs a call more"
    ),
    PrivateName("torch._C._nn", "names of functions that a product may be", "none"),
    PrivateName("torch._foreach_copy_", "copies many tensors by one launch", "optimizers alone use it in public"),
    PrivateName("torch._foreach_mul_", "scales many tensors by one launch", "optimizers alone use it in public"),
    PrivateName("torch._scaled_mm", "products in fp8", "torch.nn.functional.scaled_mm is newer than the lowest torch"),
    PrivateName("torch.ops.aten._flash_attention_forward", "attention of packed documents", "SDPA takes no bounds"),
    PrivateName("torch.ops.aten._flash_attention_backward", "attention of packed documents", "SDPA takes no bounds"),
    PrivateName("torch.ops.aten._softmax_backward_data", "attention's gradient", "autograd alone calls it in public"),
    PrivateName("torch.ops.mkldnn._is_mkldnn_bf16_supported", "whether the processor has bf16 products", "none"),
    PrivateName("torch.ops.mkldnn._linear_pointwise", "products over weights packed once", "torch.compile alone"),
    PrivateName("torch.ops.mkldnn._reorder_linear_weight", "packs weights once", "torch.compile alone"),
)


def can_skip_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer skips a step by itself if its attribute `found_inf` is 1."""
    return hasattr(optimizer, "_step_supports_amp_scaling")
