"""Other frameworks on the same workload: their environments, their runs, and what is fair."""
