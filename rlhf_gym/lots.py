"""Work on logits a lot of rows at a time, so that no (M, V) tensor of a large batch is ever kept.

Notation: M states, V usable tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_gym.masks import Limits

MAX_LOGITS = 1 << 25
"""Most logits of a lot: 128 MiB in float32."""

MAX_SCORED_LOGITS = 1 << 22
"""The same without a gradient on a CPU, where smaller lots cost little time."""

FEWEST_ROWS = 256
"""Rows of such a lot, however many logits they have: the head's weights are read for each."""


def logit_rows(vocab_size: int, device: torch.device) -> int:
    """How many rows of logits a lot may hold."""
    rows = MAX_LOGITS // vocab_size
    if device.type == "cpu" and not torch.is_grad_enabled():
        rows = min(rows, max(MAX_SCORED_LOGITS // vocab_size, FEWEST_ROWS))
    return max(1, rows)


def in_lots(
    work: Callable[..., Tensor], vocab_size: int, first: Tensor, *others: Tensor | Limits | None
) -> Tensor:
    """What `work` says of M rows, computed a lot at a time.

    A gradient costs each lot's forward pass a second time, and memory for a single lot. A batch
    that is one lot is computed at once, and nothing twice.

    Args:
        work: From the arguments' rows (m, …) to (m, …); a row's answer depends on no other row. No
            randomness.
        vocab_size: V.
        first: (M, …).
        *others: (M, …) each, or None.
    """
    step = logit_rows(vocab_size, first.device)
    if len(first) <= step:
        return work(first, *others)
    parts = []
    for at in range(0, len(first), step):
        lot = [_rows(part, slice(at, at + step)) for part in (first, *others)]
        if torch.is_grad_enabled():
            parts.append(checkpoint(work, *lot, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(work(*lot))
    return torch.cat(parts)


def _rows(part: Tensor | Limits | None, which: slice) -> Tensor | Limits | None:
    if part is None:
        return None
    return part.rows(which) if isinstance(part, Limits) else part[which]
