"""The method: objectives, incentives, geometry, and calibration. It needs torch alone."""
