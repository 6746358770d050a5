"""Where a run writes its metrics."""
