"""The next-token distribution behind Stable-Baselines3's `Distribution` interface."""

from typing import Any

from stable_baselines3.common.distributions import Distribution
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from rlhf_gym.lm.decoding.sampling import draw


class TokenDistribution(Distribution):
    """The next-token distribution of M states, from tempered float32 logits (M, V)."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        # Not torch's Categorical, which checks that 50,000 float32 probabilities sum to 1 and keeps
        # a second copy of the logits.
        self.log_p = F.log_softmax(logits, -1)

    @property
    def distribution(self) -> Categorical:
        """The same as a PyTorch `Categorical`, for algorithms that need a divergence (TRPO)."""
        return Categorical(logits=self.log_p, validate_args=False)

    @distribution.setter
    def distribution(self, value: Any) -> None:
        pass  # SB3's base class declares it without a value

    def proba_distribution_net(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Not used: the language model's head is the net."""
        raise NotImplementedError

    def proba_distribution(self, logits: Tensor) -> "TokenDistribution":
        """The distribution with other logits."""
        return TokenDistribution(logits)

    def log_prob(self, x: Tensor) -> Tensor:
        """(M,) log-probs of tokens (M,)."""
        return self.log_p.gather(-1, x.long().reshape(-1, 1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """(M,) nats."""
        return -(self.log_p.exp() * self.log_p).sum(-1)

    def sample(self) -> Tensor:
        """(M,) tokens, drawn."""
        return draw(self.log_p)

    def mode(self) -> Tensor:
        """(M,) likeliest tokens."""
        return self.log_p.argmax(-1)

    def actions_from_params(self, logits: Tensor, deterministic: bool = False) -> Tensor:
        """(M,) tokens of the distribution with these logits."""
        return TokenDistribution(logits).get_actions(deterministic)

    def log_prob_from_params(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) drawn tokens and their log-probs."""
        tokens = TokenDistribution(logits).sample()
        return tokens, TokenDistribution(logits).log_prob(tokens)
