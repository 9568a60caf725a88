"""The lesson of `scripts/explain.py`: its numbers, the page it prints, and its picture."""
