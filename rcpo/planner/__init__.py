"""`rcpo plan`: what a run takes before it is started, from its configuration alone."""
