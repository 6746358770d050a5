"""Counts over a set of comparisons, made before anything is trained on it."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from rlhf_gym.preferences.comparison import LABELS, Comparison
from rlhf_gym.utils.statistics import Figure


def survey(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Count what comparisons contain, and where they contradict each other.

    Args:
        comparisons: N comparisons.

    Returns:
        comparisons: N.
        prompts: Number of different prompts.
        candidates: {K: number of comparisons with K candidates}.
        labels: {form of label: number of comparisons}.
        ties: Comparisons that call candidates equal (see `has_tie`).
        duplicates: Comparisons that repeat prompt, candidates and label of an earlier one.
        conflicts: Pairs of answers to one prompt that two comparisons order in opposite ways.
        intransitive: Comparisons whose preferences contain a cycle.
        longer_won: Share of the implied pairs in which the answer with more characters won, without
            pairs of equal length. Pairs on one prompt are not independent, so the standard error is
            that of a ratio of sums over prompts. Source: Cochran 1977, chapter 6.
    """
    prompts = [json.dumps(c.prompt, sort_keys=True) for c in comparisons]
    whole = {
        (prompt, c.candidates, c.best, c.ranking, c.scores, c.votes, c.pairs, c.ties)
        for prompt, c in zip(prompts, comparisons, strict=True)
    }
    labels = Counter(name for c in comparisons for name in LABELS if getattr(c, name) is not None)
    return {
        "comparisons": len(comparisons),
        "prompts": len(set(prompts)),
        "candidates": dict(sorted(Counter(len(c.candidates) for c in comparisons).items())),
        "labels": {name: labels[name] for name in LABELS if name in labels},
        "ties": sum(map(has_tie, comparisons)),
        "duplicates": len(comparisons) - len(whole),
        "conflicts": _conflicts(prompts, comparisons),
        "intransitive": sum(map(is_intransitive, comparisons)),
        "longer_won": _longer_won(prompts, comparisons),
    }


def has_tie(comparison: Comparison) -> bool:
    """Whether a label calls candidates equal.

    That is: a shared place of a ranking, two equal scores, an annotator who found a tie, or several
    candidates with the most votes.
    """
    c = comparison
    if c.ranking is not None:
        return any(len(group) > 1 for group in c.ranking)
    if c.scores is not None:
        return len(set(c.scores)) < len(c.scores)
    return c.votes is not None and (c.ties > 0 or c.votes.count(max(c.votes)) > 1)


def is_intransitive(comparison: Comparison) -> bool:
    """Whether the preferences of a comparison contain a cycle; only judged pairs can."""
    winners: dict[int, set[int]] = defaultdict(set)
    for winner, loser in comparison.preferred:
        winners[loser].add(winner)
    try:
        TopologicalSorter(winners).prepare()
    except CycleError:
        return True
    return False


def _conflicts(prompts: Sequence[str], comparisons: Iterable[Comparison]) -> int:
    said_by: dict[tuple[str, str, str], set[int]] = defaultdict(set)
    for n, (prompt, c) in enumerate(zip(prompts, comparisons, strict=True)):
        for winner, loser in c.preferred:
            said_by[prompt, c.candidates[winner], c.candidates[loser]].add(n)
    # A single comparison that orders a pair both ways is intransitive, and counted as that.
    return sum(
        len(said_by[prompt, a, b] | said_by[prompt, b, a]) > 1
        for prompt, a, b in said_by
        if a < b and (prompt, b, a) in said_by
    )


def _longer_won(prompts: Sequence[str], comparisons: Iterable[Comparison]) -> Figure:
    won: Counter[str] = Counter()
    all_pairs: Counter[str] = Counter()
    for prompt, c in zip(prompts, comparisons, strict=True):
        for winner, loser in c.preferred:
            gap = len(c.candidates[winner]) - len(c.candidates[loser])
            won[prompt] += gap > 0
            all_pairs[prompt] += gap != 0
    clusters = [prompt for prompt, pairs in all_pairs.items() if pairs]
    n, g = all_pairs.total(), len(clusters)
    if not n:
        return {"value": math.nan, "se": math.nan, "n": 0}
    share = won.total() / n
    squares = sum((won[prompt] - share * all_pairs[prompt]) ** 2 for prompt in clusters)
    se = math.sqrt(squares * g / (g - 1)) / n if g > 1 else math.nan
    return {"value": share, "se": se, "n": n}
