"""REINFORCE, each response against the others to its prompt (RLOO). ``--algorithm rloo``.

Ahmadian et al. 2024, "Back to Basics": the return of a whole response, its KL penalty taken off, is
the advantage of each of its tokens. No critic. With several steps an update the ratio's clip is
PPO's; with `n_minibatches` 1 the one step is REINFORCE's.
"""

from dataclasses import dataclass

from agents import ppo
from agents.sb3.rollout.advantages import Baseline

make = ppo.make


@dataclass(frozen=True)
class Config(ppo.Config):
    """Options of RLOO."""

    learning_rate: float = 3e-4
    critic: ppo.Critic = "shared"
    critic_warmup: int = 0
    n_waves: int = 2
    n_epochs: int = 1
    baseline: Baseline = "leave_one_out"
    samples_per_prompt: int | None = 8
