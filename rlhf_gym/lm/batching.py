"""Which rows go through a model together: those of like length, so that little is padding.

Notation: N rows, M chosen tokens.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf_gym.lm.architecture import trunk
from rlhf_gym.lm.masks import Limits
from rlhf_gym.tokens import Sequences

LAYER_COST = 4e7
"""Operations that two cores could do while a layer's calls keep them waiting."""

LEAST_COST = 32
"""Tokens that could be computed while the weights are read, or their gradient is added up."""

NEVER = 1 << 40
"""More tokens than any pass has."""


def layer_operations(model: PreTrainedModel, tokens: float, scores: float) -> float:
    """About how many operations a layer takes for so many tokens and attention scores.

    12 d² weights a token; 4 d operations a score, and its exponential, about 100, in every head.
    """
    config = model.config.get_text_config()
    d, heads = int(config.hidden_size), int(config.num_attention_heads)
    return tokens * 24 * d**2 + scores * (4 * d + 100 * heads)


def layer_weights(model: PreTrainedModel) -> int:
    """Parameters of the trunk without its embedding of tokens."""
    return max(sum(p.numel() for p in trunk(model).parameters()) - _table(model), 1)


def _table(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    return sum(p.numel() for p in embedding.parameters()) if embedding is not None else 0


def pass_cost(model: PreTrainedModel) -> int:
    """Tokens that could be computed in the time which a pass takes beside its tokens' own.

    On a GPU one pass more never pays.
    """
    if model.device.type != "cpu":
        return NEVER
    table, weights = _table(model), layer_weights(model)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    # Two operations a weight; the embedding's gradient is added up over its whole table.
    return int(LAYER_COST * layers / (2 * weights) + LEAST_COST * (1 + table / weights))


def tokens_per_pass(device: torch.device) -> int:
    """Tokens that one no-gradient pass takes: what fits a CPU's cache, or fills a GPU."""
    return 1 << (12 if device.type == "cpu" else 16)


def by_length(lengths: Sequence[int], max_tokens: int, cost: int) -> list[list[int]]:
    """Groups of rows that are cheap to compute: each takes rows × its longest + `cost`.

    The cheapest cuts of the rows by length; groups that would be too large are cut once more.

    Args:
        lengths: Of N rows, in tokens.
        max_tokens: Most tokens of a group, padding included (at least one row a group).
        cost: Of a group, in tokens (`pass_cost`).

    Returns:
        Rows of each group, the shortest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    padded = len(order) * lengths[order[-1]] if order else 0
    cuts = _cuts([lengths[row] for row in order], cost) if cost < padded else set()
    groups, at = [], 0
    while at < len(order):
        end = at + 1
        while (
            end < len(order)
            and end not in cuts
            and (end + 1 - at) * lengths[order[end]] <= max_tokens
        ):
            end += 1
        groups.append(order[at:end])
        at = end
    return groups


def passes(
    model: PreTrainedModel, sequences: Sequences, max_tokens: int | None = None
) -> Iterator[tuple[Sequences, Tensor]]:
    """Cut rows into the groups (`by_length`) that a model takes at a time.

    Args:
        model: Which.
        sequences: N rows with M chosen tokens.
        max_tokens: Most tokens of a group; `tokens_per_pass` if None.

    Yields:
        Some of the rows, and the places (int64) of their chosen tokens among all M.
    """
    max_tokens = max_tokens or tokens_per_pass(sequences.tokens.device)
    totals = (sequences.starts + sequences.lengths).tolist()
    first = torch.cumsum(sequences.lengths, 0) - sequences.lengths
    for group in by_length(totals, max_tokens, pass_cost(model)):
        rows = torch.tensor(group, device=first.device)
        part = sequences.rows(rows)
        within, columns = part.cells()
        yield part, first[rows][within] + columns - part.starts[within]


def _cuts(ascending: Sequence[int], cost: int) -> set[int]:
    """Where to cut rows of ascending lengths, by dynamic programming over the lengths there are."""
    widths, counts = np.unique(np.asarray(ascending), return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    # The least that the rows up to an end cost, and where the last group of them begins.
    least, begins = np.zeros(len(ends)), np.zeros(len(ends), dtype=np.int64)
    for i in range(1, len(ends)):
        costs = least[:i] + (ends[i] - ends[:i]) * widths[i - 1] + cost
        begins[i] = costs.argmin()
        least[i] = costs[begins[i]]
    cuts, i = set(), len(widths)
    while i:
        i = int(begins[i])
        cuts.add(int(ends[i]))
    return cuts


MAX_LOGITS = 1 << 25
"""Most logits of a lot: 128 MiB in float32."""


MAX_SCORED_LOGITS = 1 << 22
"""The same without a gradient on a CPU, where smaller lots cost little time."""


FEWEST_ROWS = 256
"""Rows of such a lot, however many logits they have: the head's weights are read for each."""


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    """How many rows of logits a lot may hold."""
    rows = MAX_LOGITS // vocab_size
    if device.type == "cpu" and not torch.is_grad_enabled():
        rows = min(rows, max(MAX_SCORED_LOGITS // vocab_size, FEWEST_ROWS))
    return max(1, rows)


def in_chunks(
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
    step = rows_per_chunk(vocab_size, first.device)
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
