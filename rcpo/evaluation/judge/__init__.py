"""Another model compares the run's answers with others."""
