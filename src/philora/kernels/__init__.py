"""Fast paths that stand in for parts of a transformers model; each equals the part it replaces."""
