"""How good a model's answers are: losses, scores and their intervals, judges, what was forgotten."""
