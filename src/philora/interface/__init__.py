"""philora as a Python library: a function for each command, and a run as an object."""
