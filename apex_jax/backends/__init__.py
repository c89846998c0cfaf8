"""Backends of the dispatch loop."""
