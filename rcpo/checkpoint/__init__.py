"""Checkpoints: written, verified, read, and resumed from."""
