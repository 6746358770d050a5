"""sb3-contrib's TRPO on whole sequences. ``--algorithm sb3_trpo``."""

from dataclasses import dataclass

from agents.sb3.learning.learner import SB3Learner, stock_learner
from agents.sb3.stock.contrib import contrib
from rlhf_gym.envs import TokenVectorEnv


@dataclass(frozen=True)
class Config:
    """Options of sb3-contrib's TRPO."""

    learning_rate: float = 1e-3
    """Initial learning rate of the critic; it decays linearly to 0."""
    n_steps: int = 64
    """Tokens that each row samples between updates."""
    batch_size: int = 1024
    """Tokens per minibatch of the critic. The actual number varies, because sequences are not
    split. The policy's step uses all tokens at once."""
    target_kl: float = 0.01
    """Largest KL of a policy step, in nats per token."""
    cg_max_steps: int = 10
    """Maximum iterations of the conjugate gradient method."""
    cg_damping: float = 0.1
    """Multiple of the identity that is added to the Hessian."""
    line_search_max_iter: int = 10
    """Maximum step sizes that the line search tries."""
    n_critic_updates: int = 5
    """Passes of the critic over the tokens of each update."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation (GAE)."""


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    contrib()
    # This module imports sb3-contrib, so contrib() must check for it first.
    from agents.sb3.stock.trpo import TRPO

    # TRPO needs second derivatives, which fused attention does not have.
    eager = {"attn_implementation": "eager"}
    return stock_learner(TRPO, config, env, policy_options=eager)
