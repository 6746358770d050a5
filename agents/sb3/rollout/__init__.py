"""The rollout: buffer, advantages, metrics."""
