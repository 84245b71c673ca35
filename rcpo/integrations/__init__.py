"""Reward calibration inside other people's trainers."""
