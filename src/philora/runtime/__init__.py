"""Manage the process and its surroundings: signals, other processes of a run, limits, caches, the Hub's connection."""
