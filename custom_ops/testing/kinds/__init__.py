"""The checks, a file for each kind; each ends in its part of the table."""
