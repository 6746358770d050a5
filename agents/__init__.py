"""The agents of rlhf_gym: who acts. (Another package, openai-agents, uses this import name too.)"""
