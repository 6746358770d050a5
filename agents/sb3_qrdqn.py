"""sb3-contrib's QRDQN with a causal LM as Q-network. ``--algorithm sb3_qrdqn``.

The quantiles of all tokens need a head with n_quantiles × V rows, so it suits small vocabularies.
Everything else is as in sb3_dqn.
"""

from dataclasses import dataclass

from agents import sb3_dqn
from agents.sb3.stock.contrib import contrib
from agents.sb3.stock.q_network import QLearner, build_q_learner
from rlhf_gym.envs import TokenVectorEnv
from rlhf_gym.errors import InputError


@dataclass(frozen=True)
class Config(sb3_dqn.Config):
    """Options of sb3-contrib's QRDQN."""

    n_quantiles: int = 16
    """Quantiles of each token's value."""


def make(config: Config, env: TokenVectorEnv) -> QLearner:
    """Build the learner on `env`."""
    if config.n_quantiles < 1:
        raise InputError(f"n_quantiles must be at least 1, not {config.n_quantiles}")
    algorithm = contrib().QRDQN
    # This module imports sb3-contrib, so contrib() must check for it first.
    from agents.sb3.stock.quantiles import CausalLMQRDQNPolicy

    shared = sb3_dqn.Config(**{k: v for k, v in vars(config).items() if k != "n_quantiles"})
    return build_q_learner(algorithm, CausalLMQRDQNPolicy, shared, env, config.n_quantiles)
