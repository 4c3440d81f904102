"""Adapters on a model: which modules a name means, slices of fused projections, the fast layers, loading, coverage."""
