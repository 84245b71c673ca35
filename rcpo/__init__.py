"""rcpo: preference optimization with reward calibration (arXiv 2604.18239)."""

__version__ = "0.1.0"
