"""Options and critic that the adapters to other libraries' PPO share."""

import copy
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from rlhf_gym.lm.architecture import trunk
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.decode_cache import last_hidden


@dataclass(frozen=True)
class Config:
    """Options of a library's PPO. A token is one step."""

    learning_rate: float = 3e-4
    """Learning rate of policy and critic."""
    n_steps: int = 8
    """Tokens that each row samples between updates."""
    batch_size: int = 256
    """Tokens per minibatch."""
    n_epochs: int = 1
    """Passes over the tokens of each update."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation (GAE)."""
    clip_range: float = 0.2
    """Clip range ε of the probability ratio."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient; larger gradients are scaled down."""


class Critic(nn.Module):
    """A copy of the reference's trunk with a linear value head that starts at 0.

    Args:
        reference: The reference model of the environment.
    """

    def __init__(self, reference: CausalLM) -> None:
        super().__init__()
        body: Any = copy.deepcopy(trunk(reference.model)).requires_grad_(True)
        self.trunk = body
        self.head = nn.Linear(body.config.get_text_config().hidden_size, 1).to(reference.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._lm = replace(reference, model=body)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return values (N, 1) of the states that rows of tokens (N, L) describe."""
        values: Tensor = self.head(last_hidden(self._lm, tokens))
        return values
