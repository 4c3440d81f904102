"""Files that are written atomically, with manifests and locks."""
