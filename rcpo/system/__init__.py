"""Processes, signals, files, and text: what does not know rcpo."""
