"""Analyse a reward model: accuracy by kind of comparison, simple rules, calibration, mistakes.

Notation: N comparisons, K candidates in one.
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
    proportion,
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
    """Compute a model's top-1 accuracy minus that of a rule on the same comparisons.

    The interval is computed from the paired differences. It is narrower than that of two separate
    accuracies, because comparisons that are hard for both cancel.

    Args:
        model: The model's predictions for N comparisons.
        rule: The rule's predictions for the same comparisons.
        prompts: (N,) number of each comparison's prompt.
        seed: Seed of the bootstrap.
    """
    return clustered(model.top1 - rule.top1, prompts, seed)


def margins(said: Predictions) -> Floats:
    """Return each comparison's highest logit minus its second highest: (N,)."""
    return np.array([float(np.diff(np.sort(x)[-2:])[0]) for x in said.logits])


def length_gaps(comparisons: Sequence[Comparison]) -> Floats:
    """Return the mean characters of the preferred candidates minus those of the others: (N,).

    NaN for a comparison without a preferred candidate.
    """
    out = []
    for comparison in comparisons:
        lengths = np.array([len(text) for text in comparison.candidates], dtype=np.float64)
        top = np.isin(np.arange(len(lengths)), comparison.tops)
        out.append(float(lengths[top].mean() - lengths[~top].mean()) if top.any() else np.nan)
    return np.array(out)


def quartiles(values: Floats) -> Ints:
    """Return the quarter, 0 to 3, of each value, and −1 for NaN: (N,) -> (N,).

    Equal values are in the same quarter, so quarters may differ in size, and some may be empty.
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
    """Compute the top-1 accuracy for each number of candidates K.

    Args:
        said: The model's predictions for N comparisons.
        chance: The predictions of `uniform` for the same comparisons.
        prompts: (N,) number of each comparison's prompt.
        seed: Seed of the bootstrap.

    Returns:
        For each K with at least one preference: `k`, `accuracy` (a figure), `chance` (a number).
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
    """Compute the top-1 accuracy in each quarter of the comparisons that have a preference.

    Args:
        values: (N,) the values that order the comparisons; one with NaN is left out.
        said: The model's predictions for N comparisons.
        chance: The predictions of `uniform` for the same comparisons.
        prompts: (N,) number of each comparison's prompt.
        seed: Seed of the bootstrap.

    Returns:
        For each quarter that is not empty, lowest values first: its smallest and largest value
        (`from`, `to`), `accuracy` (a figure), `chance` (a number).
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
        "accuracy": proportion(said.top1[inside], prompts[inside], seed),
        "chance": float(chance.top1[inside].mean()),
    }


def worst_mistakes(said: Predictions, most: int) -> list[int]:
    """Find the comparisons that the model got wrong with the highest confidence, worst first.

    Args:
        said: The model's predictions for N comparisons.
        most: Most comparisons to return.

    Returns:
        Indices of comparisons in which no candidate with the highest logit is a preferred one, by
        decreasing negative log-likelihood.
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
    """Measure a reward model on comparisons: accuracies by slice, calibration, worst mistakes.

    Args:
        model: The reward model.
        comparisons: The comparisons to measure on. The model should not have been trained on them.
        learnt: Comparisons to fit the bag of words to, one of the rules that the model is compared
            with. The rule is left out if they imply fewer than two pairs.
        max_tokens: Most tokens of a prompt with one candidate; None takes the model's context.
        too_long: What to do with longer comparisons.
        seed: Seed of the bootstrap behind the intervals.
        progress: Whether to print how many comparisons fit.

    Returns:
        The figures, as values of strict JSON. `counts` says how many comparisons fitted.

    Raises:
        InputError: No comparison fits the model.
    """
    longest_row = max_tokens or context_length(model.model)
    encoded, fit = encode_comparisons(comparisons, model, longest_row, too_long=too_long)
    if progress:
        print(f"{len(encoded)} comparisons to measure on; of all, {fit} ({longest_row} tokens)")
    figures = measure(predictions(model, encoded), learnt, seed)
    return plain({"counts": asdict(fit), **figures})  # type: ignore[no-any-return]


def measure(said: Predictions, learnt: Sequence[Comparison], seed: int) -> dict[str, Any]:
    """Compute all figures.

    Args:
        said: The model's predictions.
        learnt: Comparisons to fit the bag of words to; it is left out if they imply fewer than two
            pairs.
        seed: Seed of the bootstrap.
    """
    comparisons = said.comparisons
    prompts = prompt_numbers(comparisons)

    def over(values: Floats) -> Figure:
        return clustered(values, prompts, seed)

    rules = {"longest": baseline(longest, comparisons)}
    # The logistic regression needs a pair of each of its two classes.
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
    """Return a comparison with the model's probabilities of its candidates."""
    comparison = said.comparisons[i]
    return {
        "prompt": comparison.prompt,
        "candidates": list(comparison.candidates),
        "probabilities": probabilities(said.logits[i]).tolist(),
        "preferred": list(comparison.tops),
        "nll": float(said.nll[i]),
    }


def plain(value: Any) -> Any:
    """Convert a value for strict JSON: null for NaN and infinity, text for a path."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
