"""Put adapters on a model: names of modules, slices of fused projections, fast layers, loading, coverage."""
