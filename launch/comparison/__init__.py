"""Comparisons of schedules and frameworks: one workload file, result files that say everything."""
