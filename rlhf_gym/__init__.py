"""RLHF as a standard RL benchmark: a causal LM acts in a Gymnasium environment, token by token."""

from gymnasium.envs.registration import register

__version__ = "0.1.0.dev0"

register(
    id="rlhf_gym/Text-v0",
    entry_point="rlhf_gym.tasks.text:text_env",
    vector_entry_point="rlhf_gym.tasks.text:text_vector_env",
)

register(
    id="rlhf_gym/Reviews-v0",
    entry_point="rlhf_gym.tasks.reviews:reviews_env",
    vector_entry_point="rlhf_gym.tasks.reviews:reviews_vector_env",
)

register(
    id="rlhf_gym/Exact-v0",
    entry_point="rlhf_gym.tasks.exact:exact_env",
    vector_entry_point="rlhf_gym.tasks.exact:exact_vector_env",
)

for _setting in ("IMDB-v0", "TLDR-v0", "HH-v0", "Sentiment-v0", "Descriptiveness-v0"):
    register(
        id=f"rlhf_gym/{_setting}",
        entry_point="rlhf_gym.tasks.published:published_env",
        vector_entry_point="rlhf_gym.tasks.published:published_vector_env",
        kwargs={"setting": _setting},
    )
