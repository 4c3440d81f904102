"""Estimates before a run: memory, time, steps, and limits of the machine."""
