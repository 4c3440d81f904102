"""Fast paths that stand in for parts of a transformers model; each equals the part it replaces."""

from philora.process_state import defer_wandb

defer_wandb()  # before TRL is imported
