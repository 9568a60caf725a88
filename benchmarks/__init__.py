"""The measurements of `benchmark.py`: what is timed against what, the goals, table and picture."""
