"""Model families: Flax NNX modules, their config.json readers and their weights."""
