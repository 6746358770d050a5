"""`rlhf_gym/Reviews-v0`: film reviews, completely inside the package; no network, no download.

The reference is a small Llama trained on reviews of `rlhf_gym.tasks.grammar`. The packaged reward
model was trained on choices that a simulated human (`rlhf_gym.rewards.human`, VADER) made among
K = 4 of the reference's responses. `scripts/assets/reviews.py` makes both, and the prompts.
"""

from pathlib import Path
from typing import Any

from rlhf_gym.envs import TokenEnv, TokenVectorEnv
from rlhf_gym.envs.token_env import entry_point
from rlhf_gym.tasks.keywords import passes_on
from rlhf_gym.tasks.text import text_env, text_vector_env

ASSETS = Path(__file__).parent / "assets" / "reviews"

DEFAULTS: dict[str, Any] = {
    "reference": str(ASSETS / "reference"),
    "reward_model": str(ASSETS / "reward_model"),
    "prompts": str(ASSETS / "prompts.json"),
    "max_prompt_tokens": 12,
    "max_new_tokens": 40,
    "kl_coef": 0.4,
    "gold": "rlhf_gym.rewards.human:compound",
}
"""Other keywords of `rlhf_gym/Text-v0` may be given too."""


@entry_point
def reviews_env(*, render_mode: str | None = None, **keywords: Any) -> TokenEnv:
    """`rlhf_gym/Reviews-v0` for `gym.make`."""
    return text_env(render_mode=render_mode, **{**DEFAULTS, **keywords})


@passes_on(text_vector_env, lambda: DEFAULTS)
def reviews_vector_env(
    *, num_envs: int = 1, autoreset_mode: str = "SameStep", **keywords: Any
) -> TokenVectorEnv:
    """`rlhf_gym/Reviews-v0` for `gym.make_vec`."""
    return text_vector_env(
        num_envs=num_envs, autoreset_mode=autoreset_mode, **{**DEFAULTS, **keywords}
    )
