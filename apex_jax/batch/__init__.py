"""Batch jobs: request files in, result files out, resumable."""
