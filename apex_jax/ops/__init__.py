"""Native operations, called from JAX through XLA's FFI. Importing loads nothing: see load()."""
