"""What people see of a run: the report, the model card, progress in the terminal, uploads."""
