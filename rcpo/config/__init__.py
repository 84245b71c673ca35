"""Configuration: Hydra composes it, dataclasses hold it, and it is validated before anything is loaded."""
