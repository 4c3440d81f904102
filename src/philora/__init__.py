"""philora fine-tunes Phi language models with LoRA on a person's own chat data."""

__version__ = "0.1.0"
