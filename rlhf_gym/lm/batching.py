"""Which rows go through a model together: rows of similar length, so that little is padding.

Also the vocabulary's side of it: logits of many tokens are computed a chunk at a time.

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
"""Fixed cost of one layer in a forward and backward pass, in operations; measured on two cores."""

LEAST_COST = 32
"""Fixed cost of reading the weights or adding up their gradient, in tokens."""

NEVER = 1 << 40
"""A cost in tokens that no saving reaches."""


def layer_operations(model: PreTrainedModel, tokens: float, scores: float) -> float:
    """Approximate operations of a layer for this many tokens and attention scores.

    Each token multiplies 12 d² weights (two operations each). Each score takes 4 d operations over
    all heads, and an exponential of about 100 operations in every head.
    """
    config = model.config.get_text_config()
    d, heads = int(config.hidden_size), int(config.num_attention_heads)
    return tokens * 24 * d**2 + scores * (4 * d + 100 * heads)


def layer_weights(model: PreTrainedModel) -> int:
    """Number of parameters of the trunk without its token embedding."""
    return max(sum(p.numel() for p in trunk(model).parameters()) - _table(model), 1)


def _table(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings()
    return sum(p.numel() for p in embedding.parameters()) if embedding is not None else 0


def pass_cost(model: PreTrainedModel) -> int:
    """Fixed cost of one forward pass, in tokens.

    On a GPU an additional pass never pays.
    """
    if model.device.type != "cpu":
        return NEVER
    table, weights = _table(model), layer_weights(model)
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    # Two operations per weight; the embedding's gradient is added up over its whole table.
    return int(LAYER_COST * layers / (2 * weights) + LEAST_COST * (1 + table / weights))


def tokens_per_pass(device: torch.device) -> int:
    """Most tokens of a pass without gradient: what fits a CPU's cache, or fills a GPU."""
    return 1 << (12 if device.type == "cpu" else 16)


def by_length(lengths: Sequence[int], max_tokens: int, cost: int) -> list[list[int]]:
    """Group rows by length at the least total cost.

    A group costs its number of rows × its longest row + `cost`. Groups above `max_tokens` are cut
    again.

    Args:
        lengths: Tokens of each of N rows.
        max_tokens: Most tokens of a group, padding included (a group has at least one row).
        cost: Fixed cost of a group, in tokens (`pass_cost`).

    Returns:
        Indices of the rows of each group, the shortest rows first.
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
    """The forward passes that rows are best cut into (`by_length`).

    Args:
        model: The model that computes them.
        sequences: N rows with M chosen tokens.
        max_tokens: Most tokens of a pass; `tokens_per_pass` if None.

    Yields:
        The rows of a pass, and the indices (int64) of their chosen tokens among all M.
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
    """Where to cut rows of ascending lengths, by dynamic programming over the distinct lengths."""
    widths, counts = np.unique(np.asarray(ascending), return_counts=True)
    ends = np.concatenate([[0], np.cumsum(counts)])
    # The least cost of the rows up to each end, and where the last group of that solution begins.
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
"""Most logits of a chunk: 128 MiB in float32."""

MAX_SCORED_LOGITS = 1 << 22
"""The same without a gradient on a CPU, where smaller chunks cost little time."""

FEWEST_ROWS = 256
"""Fewest rows of a chunk without a gradient: each chunk reads all weights of the head."""


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    """Number of rows of logits in a chunk."""
    rows = MAX_LOGITS // vocab_size
    if device.type == "cpu" and not torch.is_grad_enabled():
        rows = min(rows, max(MAX_SCORED_LOGITS // vocab_size, FEWEST_ROWS))
    return max(1, rows)


def in_chunks(
    work: Callable[..., Tensor], vocab_size: int, first: Tensor, *others: Tensor | Limits | None
) -> Tensor:
    """Apply `work` to M rows, a chunk at a time, so that no (M, V) tensor ever exists.

    With a gradient, the backward pass computes each chunk's forward pass again and so needs memory
    for one chunk only. Rows that fit one chunk are computed directly, and only once.

    Args:
        work: From the arguments' rows (m, …) to (m, …). A row's result must not depend on other
            rows or on chance.
        vocab_size: V.
        first: (M, …).
        *others: (M, …) each, or None.
    """
    step = rows_per_chunk(vocab_size, first.device)
    if len(first) <= step:
        return work(first, *others)
    parts = []
    for at in range(0, len(first), step):
        chunk = [_rows(part, slice(at, at + step)) for part in (first, *others)]
        if torch.is_grad_enabled():
            parts.append(checkpoint(work, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(work(*chunk))
    return torch.cat(parts)


def _rows(part: Tensor | Limits | None, which: slice) -> Tensor | Limits | None:
    if part is None:
        return None
    return part.rows(which) if isinstance(part, Limits) else part[which]
