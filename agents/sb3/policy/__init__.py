"""The language model as a Stable-Baselines3 policy."""
