"""The lesson of `explain.py`: its numbers, the page it prints, and its picture."""
