"""sb3-contrib's TRPO, with all gradients from one backward pass.

The library runs a separate backward pass for each weight tensor, and each Hessian-vector product
goes through all of them again. On a transformer of five layers that is twelve times the work for
the same numbers. The library also treats every weight with "value" in its name as the critic's, but
GPT-NeoX names its attention weights query_key_value.
"""

import sb3_contrib
import torch
from torch import Tensor
from torch.nn import Parameter

from agents.sb3.policy.causal_lm_policy import CausalLMPolicy


class TRPO(sb3_contrib.TRPO):
    """TRPO that differentiates all weights of the language model in one backward pass."""

    policy: CausalLMPolicy

    def _compute_actor_grad(
        self, kl_div: Tensor, policy_objective: Tensor
    ) -> tuple[list[Parameter], Tensor, Tensor, list[tuple[int, ...]]]:
        weights = [p for p in self.policy.lm.parameters() if p.requires_grad]
        grads = torch.autograd.grad(kl_div, weights, create_graph=True, allow_unused=True)
        used = [(p, grad) for p, grad in zip(weights, grads, strict=True) if grad is not None]
        actor, flat_kl = [p for p, _ in used], torch.cat([grad.flatten() for _, grad in used])
        # Keep the graph: the Hessian-vector products use it later.
        surrogate = torch.autograd.grad(policy_objective, actor, retain_graph=True)
        flat_surrogate = torch.cat([grad.flatten() for grad in surrogate])
        return actor, flat_surrogate, flat_kl, [p.shape for p in actor]
