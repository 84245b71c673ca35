"""A run's folder: its file names, what is logged there, and how finished runs compare."""
