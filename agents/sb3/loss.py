"""The terms of PPO's loss, token by token.

Notation: M chosen tokens, d the trunk's width, V usable tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from agents.sb3.options import KLLoss
from agents.sb3.policy.causal_lm_policy import CausalLMPolicy, Evaluation
from agents.sb3.rollout.buffer import SequenceSamples
from rlhf_gym.kl import k2, k3
from rlhf_gym.lm.causal_lm import CausalLM, kl_to


@dataclass(frozen=True)
class Loss:
    """What an update maximises, with the weights of its terms.

    Attributes:
        policy: π_θ and V.
        clip_range: ε of the ratio's clip.
        clip_range_vf: How far a value may move before its loss is clipped; None never clips.
        kl_old_coef: Weight of KL(π_old ‖ π_θ).
        vf_coef: Weight of the value loss; values are never computed at 0.
        ent_coef: Weight of the entropy; entropies are never computed at 0.
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
        now = self.policy.evaluate_sequences(
            batch.observations,
            values=self.vf_coef != 0,
            entropies=self.ent_coef != 0,
            learning=True,
        )
        # PPO's surrogate (Schulman et al. 2017, equation 7): the smaller of the two gives no
        # reason to move a ratio further once it has left the clip in the advantage's direction.
        ratio = (now.log_probs - batch.old_log_prob).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        surrogate = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
        kl_old = self.kl_from_old(batch, now)
        objective = surrogate - self.kl_old_coef * kl_old
        terms = {
            "policy_loss": -surrogate.detach(),
            "kl_old": kl_old.detach(),
            "clip_fraction": ((ratio - 1).abs() > self.clip_range).float(),
            "ratio": ratio.detach(),
        }
        if now.values is not None:
            value_loss = self.value_loss(now.values, batch.old_values, batch.returns)
            objective = objective - self.vf_coef * value_loss
            terms["value_loss"] = value_loss.detach()
        if now.entropies is not None:
            objective = objective + self.ent_coef * now.entropies
        if self.kl_loss is not None:
            objective = objective - self.kl_coef * self.kl_to_reference(batch, now)
        return {"objective": objective, **terms}

    def critic_terms(self, batch: SequenceSamples) -> dict[str, Tensor]:
        """The critic's term alone, (M,) each: the language model gets no gradient."""
        sequences, policy = batch.observations, self.policy
        with torch.no_grad():
            hidden = policy.core.states(sequences) if policy.critic.shared else None
        values = policy.critic(policy.critic.states(sequences, hidden)).flatten()
        value_loss = self.value_loss(values, batch.old_values, batch.returns)
        return {"objective": -self.vf_coef * value_loss, "value_loss": value_loss.detach()}

    def value_loss(self, values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
        """(M,) squared errors, or those of the clipped values where they are larger."""
        loss = (values - returns) ** 2
        if self.clip_range_vf is None:
            return loss
        near = old_values + (values - old_values).clamp(-self.clip_range_vf, self.clip_range_vf)
        return torch.maximum(loss, (near - returns) ** 2)

    def kl_from_old(self, batch: SequenceSamples, now: Evaluation) -> Tensor:
        """KL(π_old ‖ π_θ) in each state or its estimate by the chosen token: (M,)."""
        if self.old is None:
            return k3(batch.old_log_prob, now.log_probs)
        with torch.no_grad():
            at_old = self.old.states(batch.observations)
        return kl_to(at_old, self.old, now.hidden, self.policy.core, now.limits)

    def kl_to_reference(self, batch: SequenceSamples, now: Evaluation) -> Tensor:
        """The penalty of the loss at each chosen token, (M,)."""
        if self.kl_loss != "exact":
            return (k2 if self.kl_loss == "k2" else k3)(now.log_probs, batch.ref_log_prob)
        assert self.reference is not None
        with torch.no_grad():
            at_reference = self.reference.states(batch.observations)
        return kl_to(now.hidden, self.policy.core, at_reference, self.reference, now.limits)
