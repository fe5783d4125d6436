"""Files of runs: folders, locks, checkpoints, reports."""
