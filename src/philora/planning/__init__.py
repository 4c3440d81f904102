"""Estimate a run before it starts: memory, time, steps, and limits of the machine."""
