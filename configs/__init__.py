"""Jobs, written down: each module has a get_config() that returns an apex_jax Config."""
