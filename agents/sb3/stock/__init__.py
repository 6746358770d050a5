"""Policies and buffers for unmodified algorithms of Stable-Baselines3 and sb3-contrib."""
