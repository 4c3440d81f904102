"""LoRA layers for your own models: replace `import loralib as lora` by `from philora import lora`.

Names, arguments, shapes and checkpoints are loralib's, without its faults; `docs/loralib.md` lists all differences.
Needs torch only.

Examples:
    >>> import torch
    >>> from philora import lora
    >>> model = torch.nn.Sequential(lora.Linear(8, 8, r=2, lora_alpha=4), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> lora.mark_only_lora_as_trainable(model)
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['0.lora_A', '0.lora_B']
    >>> sorted(lora.lora_state_dict(model))
    ['0.lora_A', '0.lora_B']
"""

from philora.lora.base import LoRALayer
from philora.lora.functional import fused, fused_enabled, lora_linear, lora_merged_linear, lora_sliced_linear
from philora.lora.layers import Conv1d, Conv2d, Conv3d, ConvLoRA, Embedding, Linear, MergedLinear
from philora.lora.replace import replace_layers
from philora.lora.state import (
    disable_adapter,
    load_lora,
    lora_state_dict,
    loraplus_parameter_groups,
    mark_only_lora_as_trainable,
    merged_state_dict,
)

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvLoRA",
    "Embedding",
    "Linear",
    "LoRALayer",
    "MergedLinear",
    "disable_adapter",
    "fused",
    "fused_enabled",
    "load_lora",
    "lora_linear",
    "lora_merged_linear",
    "lora_sliced_linear",
    "lora_state_dict",
    "loraplus_parameter_groups",
    "mark_only_lora_as_trainable",
    "merged_state_dict",
    "replace_layers",
]
