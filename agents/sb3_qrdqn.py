"""sb3-contrib's QRDQN on a causal LM. ``--algorithm sb3_qrdqn``.

Quantiles of every token's value take a head of n_quantiles × V rows: for small vocabularies.
Otherwise as sb3_dqn.
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
    # Needs sb3-contrib, so it is imported after the check.
    from agents.sb3.stock.quantiles import CausalLMQRDQNPolicy

    shared = sb3_dqn.Config(**{k: v for k, v in vars(config).items() if k != "n_quantiles"})
    return build_q_learner(algorithm, CausalLMQRDQNPolicy, shared, env, config.n_quantiles)
