"""Programs that run a workload, each on one framework, started as files in its own environment."""
