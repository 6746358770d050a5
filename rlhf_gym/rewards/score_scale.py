"""The scale of a reward model's score: score = gain · logit + bias, one gain and bias per head.

A comparison fixes logits only up to a constant, and β in the objective trades score against nats of
KL. So the score needs a fixed scale. The gain is folded into the head's weights and the bias is
kept in the config: both survive `save_pretrained`, and plain transformers' logit plus the config's
`reward_bias` is the score.

Notation: B rows, M heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rlhf_gym.errors import InputError


@dataclass(frozen=True, eq=False)
class ScoreScale:
    """Gain and bias of each head.

    Attributes:
        gains: (M,) float32 on the CPU.
        biases: (M,) float32 on the CPU.
    """

    gains: Tensor
    biases: Tensor

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "ScoreScale":
        """The scale that a model's config has; gain 1 and bias 0 if it has none."""
        return cls(
            torch.tensor(getattr(config, "reward_gain", 1.0)).float().reshape(-1),
            torch.tensor(getattr(config, "reward_bias", 0.0)).float().reshape(-1),
        )

    @classmethod
    def plain(cls, heads: int) -> "ScoreScale":
        """Gain 1 and bias 0 for each head."""
        return cls(torch.ones(heads), torch.zeros(heads))

    @property
    def gain(self) -> float | list[float]:
        """The gain; a list if there are several heads."""
        return _plain(self.gains)

    @property
    def bias(self) -> float | list[float]:
        """The bias; a list if there are several heads."""
        return _plain(self.biases)

    def write(self, config: PreTrainedConfig) -> None:
        """Put gain and bias into a model's config."""
        config.reward_gain, config.reward_bias = self.gain, self.bias

    def logits(self, outputs: Tensor) -> Tensor:
        """Logits from the outputs of heads that have the gain folded in: (B, M) -> (B, M)."""
        return outputs / self.gains.to(outputs.device)

    def scores(self, logits: Tensor) -> Tensor:
        """Gain · logit + bias: (B, M) -> (B, M)."""
        return self.gains.to(logits.device) * logits + self.biases.to(logits.device)

    def rescaled(self, gain: Tensor | float, bias: Tensor | float, head: nn.Linear) -> "ScoreScale":
        """Another scale with the same logits; the head's weights change by the ratio of the gains.

        Args:
            gain: The new gain, one for all heads or (M,).
            bias: The new bias, one for all heads or (M,).
            head: The model's last layer, changed in place.
        """
        gains = torch.as_tensor(gain).float().reshape(-1).expand_as(self.gains).clone()
        biases = torch.as_tensor(bias).float().reshape(-1).expand_as(self.biases).clone()
        multiply(head, gains / self.gains)
        return ScoreScale(gains, biases)


@torch.no_grad()
def multiply(head: nn.Linear, factors: Tensor) -> None:
    """Multiply each output of a linear layer, (M,) factors, in place."""
    factors = factors.to(head.weight.device)
    head.weight.mul_(factors[:, None])
    if head.bias is not None:
        head.bias.mul_(factors)


def standardising(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and mean of logits, so that gain · (logit − mean) has mean 0 and variance 1.

    Args:
        logits: (B, M) of some responses.

    Returns:
        1 / standard deviation and the mean, each (M,) float32.

    Raises:
        InputError: The logits do not vary, so no gain could make their variance 1.
    """
    logits = logits.double().cpu()
    spread = logits.std(0, correction=0)
    if not bool((spread > 1e-6).all()):
        raise InputError(
            f"the reward model gives {len(logits)} responses the same logit (standard "
            f"deviation {float(spread.min()):.1e}); train it longer, or on more comparisons"
        )
    return (1 / spread).float(), logits.mean(0).float()


def _plain(values: Tensor) -> float | list[float]:
    return float(values) if len(values) == 1 else [float(v) for v in values]
