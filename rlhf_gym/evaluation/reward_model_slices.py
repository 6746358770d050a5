"""Where a reward model is right and where it is wrong: what is compared, sliced and read.

Notation: N comparisons, K candidates of one.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rlhf_gym.evaluation.reward_models import (
    Predictions,
    agreement,
    bag_of_words,
    baseline,
    calibration,
    clustered,
    longest,
    predictions,
    probabilities,
    prompt_numbers,
    uniform,
)
from rlhf_gym.lm.architecture import context_length
from rlhf_gym.preferences.comparison import Comparison
from rlhf_gym.preferences.encoded import TooLong, encode_comparisons
from rlhf_gym.rewards.reward_model import RewardModel
from rlhf_gym.utils.arrays import Floats, Ints
from rlhf_gym.utils.statistics import Figure

QUARTILES = (0.25, 0.5, 0.75)


def lead(model: Predictions, rule: Predictions, prompts: Ints, seed: int = 0) -> Figure:
    """Top-1 accuracy of a model less that of a rule on the same comparisons.

    The interval is that of the differences, so what makes a comparison hard for both cancels.

    Args:
        model: What the model says of N comparisons.
        rule: What the rule says of the same ones.
        prompts: (N,) number of each one's prompt.
        seed: Seed of the resampling.
    """
    return clustered(model.top1 - rule.top1, prompts, seed)


def margins(said: Predictions) -> Floats:
    """(N,) highest logit of each comparison less the second highest."""
    return np.array([float(np.diff(np.sort(x)[-2:])[0]) for x in said.logits])


def length_gaps(comparisons: Sequence[Comparison]) -> Floats:
    """(N,) mean characters of the preferred candidates less that of the others; NaN without any."""
    out = []
    for comparison in comparisons:
        lengths = np.array([len(text) for text in comparison.candidates], dtype=np.float64)
        top = np.isin(np.arange(len(lengths)), comparison.tops)
        out.append(float(lengths[top].mean() - lengths[~top].mean()) if top.any() else np.nan)
    return np.array(out)


def quartiles(values: Floats) -> Ints:
    """The quarter 0 … 3 that each value lies in, −1 for NaN: (N,) -> (N,).

    Equal values share a quarter, so quarters may differ in size, and some may be empty.
    """
    known = ~np.isnan(values)
    out = np.full(len(values), -1, dtype=np.int64)
    if known.any():
        edges = np.quantile(values[known], QUARTILES)
        out[known] = np.searchsorted(edges, values[known])
    return out


def accuracy_by_size(
    said: Predictions, chance: Predictions, prompts: Ints, seed: int = 0
) -> list[dict[str, Any]]:
    """Top-1 accuracy for each K.

    Args:
        said: What the model says of N comparisons.
        chance: What `uniform` says of them.
        prompts: (N,) number of each one's prompt.
        seed: Seed of the resampling.

    Returns:
        For each K with a preference in it: `k`, `accuracy` (a figure), `chance` (a number).
    """
    sizes = np.array([len(x) for x in said.logits])
    sizes = np.where(np.isnan(said.top1), -1, sizes)
    return [
        {"k": int(k), **_slice(sizes == k, said, chance, prompts, seed)}
        for k in np.unique(sizes[sizes >= 0])
    ]


def accuracy_by_quartile(
    values: Floats, said: Predictions, chance: Predictions, prompts: Ints, seed: int = 0
) -> list[dict[str, Any]]:
    """Top-1 accuracy in each quarter of the comparisons that have a preference.

    Args:
        values: (N,) what they are ordered by; one with NaN is left out.
        said: What the model says of N comparisons.
        chance: What `uniform` says of them.
        prompts: (N,) number of each one's prompt.
        seed: Seed of the resampling.

    Returns:
        For each quarter that is not empty, lowest values first: the least and the greatest value in
        it (`from`, `to`), `accuracy` (a figure), `chance` (a number).
    """
    values = np.where(np.isnan(said.top1), np.nan, values)
    quarter = quartiles(values)
    rows = []
    for q in np.unique(quarter[quarter >= 0]):
        inside = quarter == q
        ends = {"from": float(values[inside].min()), "to": float(values[inside].max())}
        rows.append({**ends, **_slice(inside, said, chance, prompts, seed)})
    return rows


def _slice(
    inside: npt.NDArray[np.bool_], said: Predictions, chance: Predictions, prompts: Ints, seed: int
) -> dict[str, Any]:
    return {
        "accuracy": clustered(said.top1[inside], prompts[inside], seed),
        "chance": float(chance.top1[inside].mean()),
    }


def worst_mistakes(said: Predictions, most: int) -> list[int]:
    """Which comparisons the model got wrong with most conviction, the worst first.

    Args:
        said: What the model says of N comparisons.
        most: How many at most.

    Returns:
        Places of comparisons none of whose highest logits is on top, by falling negative
        log-likelihood.
    """
    wrong = np.flatnonzero(said.top1 == 0)
    order = np.argsort(-said.nll[wrong], kind="stable")
    return [int(i) for i in wrong[order][:most]]


MISTAKES = 20


def analyse_reward_model(
    model: RewardModel,
    comparisons: Sequence[Comparison],
    learnt: Sequence[Comparison] = (),
    *,
    max_tokens: int | None = None,
    too_long: TooLong = "drop",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """All that comparisons say of a reward model: accuracies by slice, calibration, mistakes.

    Args:
        model: The reward model.
        comparisons: What it is measured on; best none that it learnt from.
        learnt: What the bag of words, one of the rules it is compared with, is fitted to; the rule
            is left out if they imply too few pairs.
        max_tokens: Longest prompt + candidate; by default the model's context.
        too_long: What to do with longer ones.
        seed: Seed of the resampling behind intervals.
        progress: Whether to print how many comparisons fit.

    Returns:
        The figures, as strict JSON can hold them; `counts` says how many comparisons fitted.

    Raises:
        InputError: No comparison fits the model.
    """
    longest_row = max_tokens or context_length(model.model)
    encoded, fit = encode_comparisons(comparisons, model, longest_row, too_long=too_long)
    if progress:
        print(f"{len(encoded)} comparisons to judge; of all, {fit} ({longest_row} tokens)")
    figures = measure(predictions(model, encoded), learnt, seed)
    return plain({"counts": asdict(fit), **figures})  # type: ignore[no-any-return]


def measure(said: Predictions, learnt: Sequence[Comparison], seed: int) -> dict[str, Any]:
    """All figures.

    Args:
        said: What the model says.
        learnt: What the bag of words is fitted to; it is left out if they imply too few pairs.
        seed: Seed of the resampling.
    """
    comparisons = said.comparisons
    prompts = prompt_numbers(comparisons)

    def over(values: Floats) -> Figure:
        return clustered(values, prompts, seed)

    rules = {"longest": baseline(longest, comparisons)}
    # Its fit needs both classes, a pair of each.
    if sum(len(c.preferred) for c in learnt) > 1:
        rules["bag_of_words"] = baseline(bag_of_words(learnt), comparisons)
    chance = rules["chance"] = baseline(uniform, comparisons)
    ece, curve = calibration(*said.claims)
    shared = over(agreement(comparisons))
    return {
        "comparisons": len(comparisons),
        "prompts": len(np.unique(prompts)),
        "without_preference": int(np.isnan(said.top1).sum()),
        "bag_of_words_learnt_from": len(learnt),
        "accuracy": over(said.top1),
        "accuracy_pairwise": over(said.pairwise),
        "nll": over(said.nll),
        "nll_uniform": over(chance.nll),
        "ece": ece if curve else None,
        "reliability": curve,
        "rules": {
            name: {
                "accuracy": over(rule.top1),
                "accuracy_pairwise": over(rule.pairwise),
                "lead": lead(said, rule, prompts, seed),
            }
            for name, rule in rules.items()
        },
        "annotator_agreement": shared if shared["n"] else None,
        "by_candidates": accuracy_by_size(said, chance, prompts, seed),
        "by_margin": accuracy_by_quartile(margins(said), said, chance, prompts, seed),
        "by_length": accuracy_by_quartile(length_gaps(comparisons), said, chance, prompts, seed),
        "mistakes": [mistake(said, i) for i in worst_mistakes(said, MISTAKES)],
    }


def mistake(said: Predictions, i: int) -> dict[str, Any]:
    """A comparison, and what the model says of it."""
    comparison = said.comparisons[i]
    return {
        "prompt": comparison.prompt,
        "candidates": list(comparison.candidates),
        "probabilities": probabilities(said.logits[i]).tolist(),
        "preferred": list(comparison.tops),
        "nll": float(said.nll[i]),
    }


def plain(value: Any) -> Any:
    """The same as strict JSON can hold it: null for NaN, text for a path."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
