"""Show a run to people: the report, the model card, progress in the terminal, uploads."""
