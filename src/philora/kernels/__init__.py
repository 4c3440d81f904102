"""Fast paths that replace parts of a transformers model and compute the same."""
