"""Shared code of the adapters to other RL libraries."""
