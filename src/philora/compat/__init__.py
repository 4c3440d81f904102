"""One file for each library: its private names that philora uses, under public ones."""
