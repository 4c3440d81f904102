"""Offer philora as a Python library: a function for every command, and a run as an object."""
