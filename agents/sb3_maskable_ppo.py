"""sb3-contrib's MaskablePPO, unmodified, on whole sequences. ``--algorithm sb3_maskable_ppo``.

It asks the environment at every step which tokens each row may choose. So it supports masks that
depend on the state (`min_new_tokens`, `top_k`, `top_p`) in a loop with one token per step.
"""

from dataclasses import dataclass

from agents import sb3_ppo
from agents.sb3.learning.learner import SB3Learner, stock_learner
from agents.sb3.stock.contrib import contrib
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config(sb3_ppo.Config):
    """Options of sb3-contrib's MaskablePPO."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    algorithm = contrib().MaskablePPO
    # This module imports sb3-contrib, so contrib() must check for it first.
    from agents.sb3.stock.maskable import MaskableCausalLMPolicy, MaskableSequenceRolloutBuffer

    return stock_learner(
        algorithm,
        config,
        env,
        policy_class=MaskableCausalLMPolicy,
        buffer=MaskableSequenceRolloutBuffer,
        buffer_options={"never": env.objective.reference.mask.never},
    )
