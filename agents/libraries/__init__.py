"""What the adapters to other RL libraries share."""
