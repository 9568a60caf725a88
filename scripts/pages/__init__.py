"""The site of docs/, and the tables of its figures."""
