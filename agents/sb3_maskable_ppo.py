"""sb3-contrib's MaskablePPO, unedited, on whole sequences. ``--algorithm sb3_maskable_ppo``.

It asks the environment at every step what each row may choose, so it serves masks that differ from
state to state (`min_new_tokens`, `top_k`, `top_p`) in a loop that takes one token at a time.
"""

from dataclasses import dataclass

from agents import sb3_ppo
from agents.sb3.run.learner import SB3Learner, stock_learner
from agents.sb3.stock.contrib import contrib
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config(sb3_ppo.Config):
    """Options of sb3-contrib's MaskablePPO."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    algorithm = contrib().MaskablePPO
    # Needs sb3-contrib, so it is imported after the check.
    from agents.sb3.stock.maskable import MaskableCausalLMPolicy, MaskableSequenceRolloutBuffer

    return stock_learner(
        algorithm,
        config,
        env,
        policy_class=MaskableCausalLMPolicy,
        buffer=MaskableSequenceRolloutBuffer,
        buffer_options={"never": env.objective.reference.mask.never},
    )
