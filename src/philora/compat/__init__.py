"""Give private names of other libraries public ones: one file for each library."""
