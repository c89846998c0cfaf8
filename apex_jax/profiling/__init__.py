"""Measuring how long stages take: what is run, how it is timed, and the table that keeps it."""
