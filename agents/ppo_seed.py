"""The flagship with the plain loss of the idea it grew from. ``--algorithm ppo_seed``.

Clipped surrogate − `kl_old_coef` · KL(π_old ‖ π_θ) − `vf_coef` · (V − R)², means per token; nothing
is whitened and one learning rate is used for all weights.
"""

from dataclasses import dataclass

from agents import ppo
from agents.sb3.options import CriticStart

make = ppo.make


@dataclass(frozen=True)
class Config(ppo.Config):
    """Options of the plain loss."""

    learning_rate: float = 1e-4
    critic: CriticStart = "shared"
    critic_lr_scale: float = 1.0
    value_lr_scale: float = 1.0
    critic_warmup: int = 0
    n_waves: int = 2
    n_epochs: int = 4
    gae_lambda: float = 0.95
    kl_old_coef: float = 0.1
    vf_coef: float = 0.5
    normalize_advantage: bool = False
