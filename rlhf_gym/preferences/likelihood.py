"""Likelihoods of human choices: one flat batch with segment sums, no padding to the largest K.

Every label consists of choices of one candidate from a set of contestants. A single choice is one
set, a ranking is one set per place, pairs are sets of two, and several annotators spread the weight
of one set over its members.

Notation: N comparisons, K_n candidates in comparison n, B candidates in all, S sets, C contestants
over all sets.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Choice = tuple[tuple[int, ...], tuple[float, ...]]
"""Contestants of one set (indices of candidates) and the weight with which each was chosen."""


class ChoiceSets(NamedTuple):
    """The choices of N comparisons over one flat batch of B candidates.

    Attributes:
        rows: (C,) int64, each contestant's row among the B candidates, set after set.
        targets: (C,) the weight with which each was chosen from its set.
        sizes: (S,) int64, number of contestants of each set; C = sizes.sum().
        owners: (S,) int64, the comparison that each set belongs to.
        comparisons: N.
    """

    rows: Tensor
    targets: Tensor
    sizes: Tensor
    owners: Tensor
    comparisons: int

    @classmethod
    def of(cls, choices: Sequence[Sequence[Choice]], sizes: Sequence[int]) -> "ChoiceSets":
        """The sets of N comparisons, given the choices and K_n of each."""
        rows: list[int] = []
        targets: list[float] = []
        set_sizes: list[int] = []
        owners: list[int] = []
        first = 0
        for n, (sets, k) in enumerate(zip(choices, sizes, strict=True)):
            for members, weights in sets:
                rows += [first + i for i in members]
                targets += weights
                set_sizes.append(len(members))
                owners.append(n)
            first += k
        return cls(
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(targets, dtype=torch.float64),
            torch.tensor(set_sizes, dtype=torch.int64),
            torch.tensor(owners, dtype=torch.int64),
            len(sizes),
        )

    def to(self, device: torch.device) -> "ChoiceSets":
        """The same sets on another device."""
        rows, targets, sizes, owners, comparisons = self
        return ChoiceSets(
            rows.to(device), targets.to(device), sizes.to(device), owners.to(device), comparisons
        )


def choice_log_probs(logits: Tensor, sizes: Tensor) -> Tensor:
    """Log P(y_i | x_n) of every candidate: log-softmax over the candidates of its set.

    Args:
        logits: (C,) of all contestants, set after set.
        sizes: (S,) int64, number of contestants of each set; C = sizes.sum().

    Returns:
        (C,) log-probabilities.
    """
    sets = torch.repeat_interleave(sizes)
    # Subtract each set's largest logit before exp; it cancels, so it needs no gradient.
    peak = torch.full((len(sizes),), -torch.inf, dtype=logits.dtype, device=logits.device)
    peak = peak.scatter_reduce(0, sets, logits.detach(), "amax")
    shifted = logits - peak[sets]
    total = torch.zeros_like(peak).index_add(0, sets, shifted.exp())
    return shifted - total.log()[sets]


def choice_loss(logits: Tensor, sets: ChoiceSets) -> Tensor:
    """Negative log-likelihood of each comparison's choices: (B,) logits -> (N,) nats.

    With soft targets it is the cross-entropy.
    """
    log_probs = choice_log_probs(logits[sets.rows], sets.sizes)
    weighted = -log_probs * sets.targets.to(logits.dtype)
    owners = torch.repeat_interleave(sets.owners, sets.sizes)
    return logits.new_zeros(sets.comparisons).index_add(0, owners, weighted)


def listwise_loss(logits: Tensor, sizes: Tensor, chosen: Tensor) -> Tensor:
    """−log P(chosen | x_n) of each comparison; minimising its mean is maximum likelihood.

    With K = 2 it is Bradley–Terry: −log σ(logit_chosen − logit_rejected).

    Args:
        logits: (B,) of all candidates, comparison after comparison.
        sizes: (N,) int64, K_n of each comparison.
        chosen: (N,) int64, index of the chosen candidate within its comparison.

    Returns:
        (N,) nats. Source: Ziegler et al. 2019, equation 1.
    """
    first = torch.cumsum(sizes, 0) - sizes
    return -choice_log_probs(logits, sizes)[first + chosen]


def plackett_luce_loss(
    logits: Tensor, sizes: Tensor, rankings: Sequence[Sequence[Sequence[int]]]
) -> Tensor:
    """Negative log-likelihood of full or partial rankings with ties.

    Args:
        logits: (B,) of all candidates, comparison after comparison.
        sizes: (N,) int64, K_n of each comparison; B = sizes.sum().
        rankings: N rankings, best first, ties together: ``[[2], [0, 1]]``; candidates that are
            not listed were not compared.

    Returns:
        (N,) nats. Source: Plackett 1975; ties as in `ranking_choices`.
    """
    sets = ChoiceSets.of([ranking_choices(ranking) for ranking in rankings], sizes.tolist())
    return choice_loss(logits, sets.to(logits.device))


def ranking_choices(ranking: Sequence[Sequence[int]]) -> list[Choice]:
    """The choices that a ranking consists of: each place is chosen from all that remain.

    Tied candidates are each chosen once from the same set, which still contains all of them
    (Breslow 1974, for tied survival times). A two-way tie costs −log σ(d) − log σ(−d), where d is
    the difference of the logits. A two-way tie therefore has its lowest loss when both logits are
    equal.
    """
    choices: list[Choice] = []
    for place, group in enumerate(ranking):
        left = tuple(i for later in ranking[place:] for i in later)
        if len(left) > 1:
            choices.append((left, tuple(float(i in group) for i in left)))
    return choices
