"""sb3-contrib's TRPO with its gradients from one backward pass.

The library asks for the gradient of each weight tensor with a backward pass of its own, and each
product with the Hessian goes through all of those passes again: twelve times the work on a
transformer of five layers, for the same numbers. It tells the critic's weights by their names,
everything with "value" in it; GPT-NeoX calls its attention's weights query_key_value.
"""

import sb3_contrib
import torch
from torch import Tensor
from torch.nn import Parameter

from agents.sb3.policy.causal_lm_policy import CausalLMPolicy


class TRPO(sb3_contrib.TRPO):
    """sb3-contrib's, but for how its gradients are asked for, and of which weights."""

    policy: CausalLMPolicy

    def _compute_actor_grad(
        self, kl_div: Tensor, policy_objective: Tensor
    ) -> tuple[list[Parameter], Tensor, Tensor, list[tuple[int, ...]]]:
        weights = [p for p in self.policy.lm.parameters() if p.requires_grad]
        grads = torch.autograd.grad(kl_div, weights, create_graph=True, allow_unused=True)
        used = [(p, grad) for p, grad in zip(weights, grads, strict=True) if grad is not None]
        actor, flat_kl = [p for p, _ in used], torch.cat([grad.flatten() for _, grad in used])
        # Products with the Hessian go through the same graph later.
        surrogate = torch.autograd.grad(policy_objective, actor, retain_graph=True)
        flat_surrogate = torch.cat([grad.flatten() for grad in surrogate])
        return actor, flat_surrogate, flat_kl, [p.shape for p in actor]
