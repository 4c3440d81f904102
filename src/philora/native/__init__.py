"""Build and call the functions in C."""
