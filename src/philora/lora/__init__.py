"""LoRA layers for models of one's own; loralib's names, arguments and checkpoints."""
