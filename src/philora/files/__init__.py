"""Write files atomically, with manifests and locks."""
