"""The terms of PPO's loss, token by token.

Notation: M chosen tokens, d the trunk's width, V usable tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents.sb3.policy.causal_lm_policy import CausalLMPolicy
from agents.sb3.rollout.buffer import SequenceSamples
from rlhf_gym.kl import k2, k3
from rlhf_gym.lm.causal_lm import CausalLM, kl_to
from rlhf_gym.lm.masks import Limits
from rlhf_gym.tokens import Sequences

KLLoss = Literal["exact", "k2", "k3"]
KLOld = Literal["k3", "exact"]


@dataclass(frozen=True)
class Loss:
    """What an update maximises, with the weights of its terms.

    Attributes:
        policy: π_θ and V.
        clip_range: ε of the ratio's clip.
        clip_range_vf: How far a value may move before its loss is clipped; None never clips.
        kl_old_coef: Weight of KL(π_old ‖ π_θ).
        vf_coef: Weight of the value loss; never computed at 0.
        ent_coef: Weight of the entropy, where the policy computes it.
        kl_coef: Weight of the penalty against the reference, where `kl_loss` puts it here.
        kl_loss: How that penalty is computed; None leaves it to the reward.
        reference: π_ref.
        old: π_old, for KL(π_old ‖ π_θ) over the whole vocabulary; None estimates it by k3.
    """

    policy: CausalLMPolicy
    clip_range: float
    clip_range_vf: float | None
    kl_old_coef: float
    vf_coef: float
    ent_coef: float
    kl_coef: float = 0.0
    kl_loss: KLLoss | None = None
    reference: CausalLM | None = None
    old: CausalLM | None = None

    def terms(self, batch: SequenceSamples) -> dict[str, Tensor]:
        """Every term for each token of a micro-batch, (M,) each; "objective" has the gradient."""
        sequences = batch.observations
        policy = self.policy
        hidden = policy.learning_states(sequences)
        limits = policy.core.limits(sequences, hidden)
        critic = policy.critic
        at_values = hidden if critic is None else policy.learning_states(sequences, critic)
        values, log_probs, entropy = policy.evaluate_hidden(
            hidden, at_values, batch.actions, limits
        )
        ratio = (log_probs - batch.old_log_prob).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        surrogate = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
        kl_old = self.kl_from_old(sequences, hidden, log_probs, batch.old_log_prob, limits)
        objective = surrogate - self.kl_old_coef * kl_old
        terms = {
            "policy_loss": -surrogate.detach(),
            "kl_old": kl_old.detach(),
            "clip_fraction": ((ratio - 1).abs() > self.clip_range).float(),
            "ratio": ratio.detach(),
        }
        if self.vf_coef:
            value_loss = self.value_loss(values.flatten(), batch.old_values, batch.returns)
            objective = objective - self.vf_coef * value_loss
            terms["value_loss"] = value_loss.detach()
        if entropy is not None:
            objective = objective + self.ent_coef * entropy
        if self.kl_loss is not None:
            kl = self.kl_to_reference(batch, hidden, log_probs, limits)
            objective = objective - self.kl_coef * kl
        return {"objective": objective, **terms}

    def critic_terms(self, batch: SequenceSamples) -> dict[str, Tensor]:
        """The critic's term alone, (M,) each: nothing has a gradient at the language model."""
        sequences, policy = batch.observations, self.policy
        with torch.no_grad():
            hidden = policy.core.states(sequences) if policy.critic is None else None
        values = policy.value_head(policy.value_states(sequences, hidden)).flatten()
        value_loss = self.value_loss(values, batch.old_values, batch.returns)
        return {"objective": -self.vf_coef * value_loss, "value_loss": value_loss.detach()}

    def value_loss(self, values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
        """(M,) squared errors, or those of the clipped values where they are larger."""
        loss = (values - returns) ** 2
        if self.clip_range_vf is None:
            return loss
        near = old_values + (values - old_values).clamp(-self.clip_range_vf, self.clip_range_vf)
        return torch.maximum(loss, (near - returns) ** 2)

    def kl_from_old(
        self,
        sequences: Sequences,
        hidden: Tensor,
        log_probs: Tensor,
        old_log_probs: Tensor,
        limits: Limits | None,
    ) -> Tensor:
        """KL(π_old ‖ π_θ) in each state or its estimate by the chosen token: (M,)."""
        if self.old is None:
            return k3(old_log_probs, log_probs)
        with torch.no_grad():
            at_old = self.old.states(sequences)
        return kl_to(at_old, self.old, hidden, self.policy.core, limits)

    def kl_to_reference(
        self, batch: SequenceSamples, hidden: Tensor, log_probs: Tensor, limits: Limits | None
    ) -> Tensor:
        """The penalty of the loss at each chosen token, (M,)."""
        if self.kl_loss != "exact":
            return (k2 if self.kl_loss == "k2" else k3)(log_probs, batch.ref_log_prob)
        assert self.reference is not None
        with torch.no_grad():
            at_reference = self.reference.states(batch.observations)
        return kl_to(hidden, self.policy.core, at_reference, self.reference, limits)
