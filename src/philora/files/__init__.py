"""Files that are written whole or not at all, with manifests and locks."""
