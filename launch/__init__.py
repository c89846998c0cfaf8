"""The command line: reads flags and files, builds a config and runs the package."""
