"""The agents of rlhf_gym: who acts. The package openai-agents has the same import name."""
