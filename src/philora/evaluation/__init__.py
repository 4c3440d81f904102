"""Evaluate models: losses, scores and their intervals, judges, forgetting."""
