"""Give private names of PEFT public ones, and list its classes that philora replaces."""

from __future__ import annotations

from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as expand_all_linear
from peft.tuners.tuners_utils import check_target_module_exists

from philora.compat.private_names import PrivateName

PRIVATE = (
    PrivateName("peft.tuners.tuners_utils._ExcludedModule", "tells excluded modules from unknown ones", "none"),
    PrivateName(
        "peft.tuners.tuners_utils._maybe_include_all_linear_layers", "expands all-linear before weights", "none"
    ),
    PrivateName("peft.tuners.tuners_utils.check_target_module_exists", "which modules a name means", "not exported"),
    PrivateName("peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters", "whether it is off", "costs a call"),
    PrivateName("peft.tuners.tuners_utils.BaseTunerLayer._active_adapter", "which adapter is on", "costs a call"),
    PrivateName(
        "peft.tuners.lora.Linear",
        "layers get the class FastLinear by `__class__`, in adapters and exporting, under PEFT's name",
        "PEFT's registry of custom layers would write them into adapter_config.json",
    ),
    PrivateName(
        "peft.PeftModelForCausalLM",
        "models get a class that records slices when it is saved, by `__class__`, in adapters",
        "save_pretrained has no hook",
    ),
)

__all__ = ["PRIVATE", "ExcludedModule", "check_target_module_exists", "expand_all_linear"]
