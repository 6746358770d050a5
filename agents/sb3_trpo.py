"""sb3-contrib's TRPO, unedited, on whole sequences. ``--algorithm sb3_trpo``."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.nn import Parameter

from agents.sb3.contrib import contrib
from agents.sb3.learner import SB3Learner, stock_learner
from agents.sb3.policy import CausalLMPolicy
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


class TRPOPolicy(CausalLMPolicy):
    """TRPO takes the critic's weights from their names: everything with "value" in it."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """As a module's, but no weight of the language model is named like a critic's."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            # GPT-NeoX calls its attention's weights query_key_value.
            ours = name.removeprefix(prefix).lstrip(".").startswith("lm.")
            yield name.replace("value", "v") if ours else name, parameter


def make(config: Config, env: TokenVectorEnv) -> SB3Learner:
    """Build the learner on `env`."""
    # Fused attention has no second derivatives.
    eager = {"attn_implementation": "eager"}
    trpo = contrib().TRPO
    return stock_learner(trpo, config, env, policy_class=TRPOPolicy, policy_options=eager)
