"""Helpers that know nothing of reinforcement learning or language models."""
