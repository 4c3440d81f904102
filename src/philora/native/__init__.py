"""Building and calling the functions in C."""
