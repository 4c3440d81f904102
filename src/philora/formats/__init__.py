"""One adapter in several layouts.

    a folder in PEFT's format ──┐                ┌── PEFT: fused, slices, or one rank and one alpha for servers
                                ├── Adapter ─────┤
    a file in loralib's format ─┘                └── loralib: lora.pt, and lora.json that says how its layers are made

Reading puts the adapter on its base model, with every check of `load_adapter` or `load_lora`, and takes the updates
off the live layers. Writing puts the new files on the same base again and compares updates and logits.
"""

from philora.formats.adapter import Adapter, Update, as_fused, as_slices, for_server
from philora.formats.conversion import Exported, export, read_adapter, restored
from philora.formats.loralib_file import read_loralib, write_loralib
from philora.formats.peft_folder import read_peft, write_peft

__all__ = [
    "Adapter",
    "Exported",
    "Update",
    "as_fused",
    "as_slices",
    "export",
    "for_server",
    "read_adapter",
    "read_loralib",
    "read_peft",
    "restored",
    "write_loralib",
    "write_peft",
]
