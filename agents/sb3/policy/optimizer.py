"""The optimiser of a policy."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def build_optimizer(
    kind: type[torch.optim.Optimizer],
    groups: Iterable[dict[str, Any]],
    learning_rate: float,
    options: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """An optimiser of parameter groups, fused where PyTorch has a fused version.

    Args:
        kind: Its class.
        groups: Parameters ("params"), and their learning rate relative to the first group's
            ("lr_scale"), which `ResponseAlgorithm` applies.
        learning_rate: At the start.
        options: Further keywords of the class.
    """
    options = dict(options)
    others = any(options.get(name) for name in ("foreach", "differentiable"))
    if issubclass(kind, torch.optim.Adam) and not others:
        # The same step in a quarter of the time: one kernel for all tensors.
        options.setdefault("fused", True)
    return kind(groups, lr=learning_rate, **options)  # type: ignore[call-arg]
