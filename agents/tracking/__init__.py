"""Recording of a run's metrics."""
