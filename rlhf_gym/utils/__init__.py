"""Helpers that do not depend on reinforcement learning or language models."""
