"""A grid of runs: its axes, its table, its plot."""
