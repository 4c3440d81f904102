"""Offer the names of `loralib.utils` for scripts that import them from there; `state` defines them."""

from philora.lora.base import LoRALayer
from philora.lora.state import lora_state_dict, mark_only_lora_as_trainable

__all__ = ["LoRALayer", "lora_state_dict", "mark_only_lora_as_trainable"]
