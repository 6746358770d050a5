"""The critic: values of states, by a linear head on the policy's trunk or on its own.

Notation: N rows, L columns, M chosen tokens, d the trunk's width.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AutoModel

from rlhf_gym.errors import InputError
from rlhf_gym.lm.architecture import embedded, is_causal
from rlhf_gym.lm.causal_lm import CausalLM
from rlhf_gym.lm.decoding.decode_cache import DecodeCache, last_hidden
from rlhf_gym.lm.loading import load_pretrained
from rlhf_gym.tokens import Sequences
from rlhf_gym.utils.progress import transformers_quiet

Observations = Tensor | Sequences
"""One row per state (Stable-Baselines3's contract), or whole sequences, one state per token."""


class Critic(nn.Module):
    """A linear value head, on the policy's trunk or on a second trunk that learns too.

    Args:
        width: d of the trunk that the head reads.
        lm: The critic's own trunk, with the policy's tokenizer, temperature and mask; None shares
            the policy's.
    """

    def __init__(self, width: int, lm: CausalLM | None = None) -> None:
        super().__init__()
        self.lm = lm
        # Registered before the head: gradients are clipped in the order of the parameters.
        self.trunk = None if lm is None else lm.model
        self._cache = None if lm is None else DecodeCache(lm)
        self.head = nn.Linear(width, 1)
        # The critic starts at exactly 0, so the first advantages are the returns.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def shared(self) -> bool:
        """Whether the head reads the policy's trunk."""
        return self.lm is None

    def states(self, obs: Observations, hidden: Tensor | None) -> Tensor:
        """What the head reads in each state: (M, d) or (N, d).

        Args:
            obs: The states.
            hidden: The policy's last hidden states there; only a shared trunk needs them.
        """
        if self.lm is None:
            assert hidden is not None
            return hidden
        if isinstance(obs, Sequences):
            return self.lm.states(obs)
        if torch.is_grad_enabled() or self.training:
            return last_hidden(self.lm, obs.long())
        assert self._cache is not None
        return self._cache.last_hidden(obs.long())

    def forward(self, states: Tensor) -> Tensor:
        """Values (M, 1) from what `states` returns."""
        values: Tensor = self.head(states)
        return values

    def clear(self) -> None:
        """Forget keys and values."""
        if self._cache is not None:
            self._cache.clear()


def load_critic(
    name: str, policy: CausalLM, *, revision: str | None, attn_implementation: str | None
) -> CausalLM:
    """The trunk of a causal LM or reward model as a critic's own.

    Args:
        name: Hub name or local path.
        policy: The policy; the critic reads its token ids.
        revision: Commit or tag on the hub.
        attn_implementation: As in transformers.

    Raises:
        InputError: It embeds fewer tokens than the policy, or is not causal.
    """
    # A reward model's head is not loaded, which transformers would report.
    with transformers_quiet():
        model = load_pretrained(
            AutoModel, name, revision=revision, attn_implementation=attn_implementation
        )
    if embedded(model) < policy.vocab_size:
        raise InputError(
            f"the critic {name!r} embeds {embedded(model)} tokens, the policy has "
            f"{policy.vocab_size}; take a model with the policy's tokenizer"
        )
    if not is_causal(model):
        raise InputError(
            f"the critic {name!r} sees later tokens of a row, so its values would know the "
            "answer; take a causal model"
        )
    return replace(policy, model=model)
