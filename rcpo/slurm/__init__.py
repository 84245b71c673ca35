"""Runs as SLURM jobs: scripts that can be read, snapshots that do not change, and what became of them."""
