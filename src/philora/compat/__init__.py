"""One file for every library: its private names that philora uses, under public ones."""
