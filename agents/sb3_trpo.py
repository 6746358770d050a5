"""sb3-contrib's TRPO on whole sequences. ``--algorithm sb3_trpo``."""

from dataclasses import dataclass

from agents.sb3.run.learner import SB3Learner, stock_learner
from agents.sb3.stock.contrib import contrib
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config:
    """Options of sb3-contrib's TRPO."""

    learning_rate: float = 1e-3
    """Learning rate of the critic, annealed linearly to 0."""
    n_steps: int = 64
    """Tokens that each row samples between updates."""
    batch_size: int = 1024
    """Tokens of a minibatch of the critic, about; the policy's step takes all at once."""
    target_kl: float = 0.01
    """Nats a token that a step may go."""
    cg_max_steps: int = 10
    """Iterations of the conjugate gradient."""
    cg_damping: float = 0.1
    """Damping of the Hessian."""
    line_search_max_iter: int = 10
    """Step sizes to try."""
    n_critic_updates: int = 5
    """Passes of the critic."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    contrib()
    # Needs sb3-contrib, so it is imported after the check.
    from agents.sb3.stock.trpo import TRPO

    # Fused attention has no second derivatives.
    eager = {"attn_implementation": "eager"}
    return stock_learner(TRPO, config, env, policy_options=eager)
