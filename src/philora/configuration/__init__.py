"""Read the configuration of a run: its sections and keys, YAML, overrides, older spellings, checks."""
