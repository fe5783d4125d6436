"""Time and memory of runs: estimates, limits and progress."""
