"""Learners for the environments of rlhf_gym. The package openai-agents has the same import name."""
