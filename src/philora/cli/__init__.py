"""Define the command line."""

from philora.cli.commands import main

__all__ = ["main"]
