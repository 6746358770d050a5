"""A language model as a distribution over next tokens."""

from rlhf_gym.lm.causal_lm import CausalLM, continuation_log_probs, kl_to, shared_causal_lm

__all__ = ["CausalLM", "continuation_log_probs", "kl_to", "shared_causal_lm"]
