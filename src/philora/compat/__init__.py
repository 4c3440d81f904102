"""One module for a library: how philora imports it, and the names of it that are not public."""
