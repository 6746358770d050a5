"""Adam as TensorFlow 1 has it: ε is not corrected for the bias of the second moment."""

from collections.abc import Callable
from typing import Any

import torch


class TF1Adam(torch.optim.Adam):
    """Adam with ε outside of the bias correction, as RLHF was first trained with.

    PyTorch divides by √(v / (1 − β₂ᵗ)) + ε, TensorFlow 1 by (√v + ε) / √(1 − β₂ᵗ): its ε is
    1 / √(1 − β₂ᵗ) times as large, 32 times at the first step. The first updates of weights with
    small gradients are that much smaller (Huang et al. 2023, The N Implementation Details of RLHF
    with PPO). Keywords as in `torch.optim.Adam`.
    """

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step."""
        kept = [group["eps"] for group in self.param_groups]
        for group in self.param_groups:
            states = (self.state.get(p) for p in group["params"])
            taken = next((float(s["step"]) for s in states if s), 0.0)
            group["eps"] /= (1 - group["betas"][1] ** (taken + 1)) ** 0.5
        try:
            return super().step(closure)
        finally:
            for group, eps in zip(self.param_groups, kept, strict=True):
                group["eps"] = eps
