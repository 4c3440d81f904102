"""Replace parts of a transformers model by faster ones that compute the same."""
