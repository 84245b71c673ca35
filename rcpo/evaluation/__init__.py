"""Held-out evaluation: preferences, generated answers, and what they say in plain words."""
